"""What to type for a package that is not installed."""


def how_to_install(extra: str) -> str:
    """The command that installs the packages of one of our extras."""
    return f"pip install '.[{extra}]' in a checkout, or 'dis-ssm[{extra}]' once that is published"
