"""dis-ssm info"""


def info() -> int:
    """Say which kernels run here, and why; fails if DIS_SSM_BACKEND forces one that cannot."""
    from dis_ssm.ops.dispatch import backend_report, forced_problem

    print("\n".join(backend_report()))
    return 1 if forced_problem() else 0
