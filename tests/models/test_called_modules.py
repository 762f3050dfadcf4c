"""Whatever people do to a Linear layer of the model takes effect: hooks, wrappers, quantisation,
parametrisations, pruning, replaced weights."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

from dis_ssm import DiS
from dis_ssm.models.mixer import BiMamba, Direction, FusedMixer

LINEARS = [
    "in_proj",
    "out_proj",
    *(f"{d}_scan.{p}_proj" for d in ("forward", "backward") for p in ("x", "dt")),
]
IN_THE_MODEL = [
    *(f"blocks.0.mixer.{name}" for name in LINEARS),
    "blocks.0.mixer.forward_scan",
    "blocks.0.mixer.backward_scan",
    "blocks.0.mixer",
    "blocks.2.skip_linear",
    "patch_embed",
    "time_embed.0",
    "time_embed.2",
    "class_embed",
    "decoder.linear",
    "decoder.modulation",
]


@pytest.fixture(params=["reference", "cpu"])
def on(request, monkeypatch):
    """Every test on both backends, chosen as users would: by the environment."""
    if request.param == "cpu":
        request.getfixturevalue("native")
    monkeypatch.setenv("DIS_SSM_BACKEND", request.param)
    return request.param


def randomise(module, std=0.2):
    for p in module.parameters():
        nn.init.normal_(p, std=std)
    return module


@pytest.fixture
def mixer():
    return randomise(BiMamba(24, d_state=5))


@pytest.fixture
def model():
    sizes = dict(input_size=4, patch_size=2, in_channels=2, hidden_size=24, depth=3, d_state=4)
    return randomise(DiS(**sizes, num_classes=3)).eval()


@pytest.fixture
def h():
    return torch.randn(2, 7, 24)


@pytest.fixture
def fused_calls(monkeypatch):
    """How often the fused path was taken."""
    calls, apply = [], FusedMixer.apply
    monkeypatch.setattr(FusedMixer, "apply", lambda *args: calls.append(1) or apply(*args))
    return calls


def inputs():
    return torch.randn(2, 2, 4, 4), torch.tensor([1.0, 7.0]), torch.tensor([0, 2])


def replace(module, name, make):
    parent, _, last = name.rpartition(".")
    parent = module.get_submodule(parent)
    setattr(parent, last, make(getattr(parent, last)))


class LoRA(nn.Module):
    """As in peft, but without a `weight`."""

    def __init__(self, base, rank=2):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


# ---- plain modules ------------------------------------------------------------------------


def test_plain_modules_take_the_fused_path(native, mixer, model, h, fused_calls):
    mixer(h)
    assert len(fused_calls) == 1
    model(*inputs())
    assert len(fused_calls) == 4
    copy.deepcopy(mixer).requires_grad_(False)(h)
    with torch.autocast("cpu", torch.bfloat16):
        mixer(h)
    mixer.bfloat16()(h.bfloat16())
    assert len(fused_calls) == 7


def test_both_paths_agree(native, mixer, h, assert_close):
    """Values and gradients; the fused path adds dt_proj's bias in the kernel."""
    fused, called = copy.deepcopy(mixer), copy.deepcopy(mixer)
    for name in LINEARS:
        called.get_submodule(name).register_forward_hook(lambda *args: None)
    y, z = fused(h), called(h)
    assert_close(z, y, 1e-6)
    for output in (y, z):
        output.square().sum().backward()
    for (name, p), q in zip(fused.named_parameters(), called.parameters(), strict=True):
        assert_close(q.grad, p.grad, 1e-5, name)


def test_autocast_leaves_delta_as_precise_as_without_a_hook(on, mixer, h):
    """A dt_proj that is called adds its bias itself: bfloat16 would lose 1 % of Δ."""
    nn.init.constant_(mixer.forward_scan.dt_proj.bias, -5.03)
    nn.init.constant_(mixer.backward_scan.dt_proj.bias, -5.03)
    truth = mixer(h)
    with torch.autocast("cpu", torch.bfloat16):
        plain = (mixer(h) - truth).norm()
        for scan in (mixer.forward_scan, mixer.backward_scan):
            scan.dt_proj.register_forward_hook(lambda *args: None)
        called = (mixer(h) - truth).norm()
    assert called <= 1.5 * plain


# ---- hooks --------------------------------------------------------------------------------


HOOKS = ["forward_pre", "forward", "full_backward_pre", "full_backward"]


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("name", IN_THE_MODEL)
def test_every_kind_of_hook_fires(on, model, name, kind):
    fired = []
    register = getattr(model.get_submodule(name), f"register_{kind}_hook")
    handle = register(lambda *args: fired.append(1))
    model(*inputs()).sum().backward()
    assert fired
    handle.remove()
    fired.clear()
    model(*inputs()).sum().backward()
    assert not fired


@pytest.mark.parametrize("name", LINEARS)
def test_a_hook_replaces_the_output(on, mixer, h, name):
    before = mixer(h)
    handle = mixer.get_submodule(name).register_forward_hook(lambda m, args, out: out * 0)
    assert not torch.allclose(mixer(h), before)
    handle.remove()
    assert torch.equal(mixer(h), before)


def test_global_hooks_see_every_linear(on, mixer, h):
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *args: seen.append(m))
    try:
        mixer(h)
    finally:
        handle.remove()
    assert {mixer.get_submodule(name) for name in LINEARS} <= set(seen)


@pytest.mark.parametrize("name", LINEARS)
def test_a_forward_of_its_own_is_called(on, mixer, h, name):
    """As accelerate's offloading does it."""
    module = mixer.get_submodule(name)
    before, forward = mixer(h), module.forward
    module.forward = lambda x: 2 * forward(x)
    assert not torch.allclose(mixer(h), before)


# ---- wrappers -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*LINEARS, "time_embed.0", "decoder.linear", "skip_linear"])
def test_a_wrapper_changes_the_output_and_learns(on, model, name):
    if name in LINEARS:
        name = f"blocks.1.mixer.{name}"
    elif name == "skip_linear":
        name = "blocks.2.skip_linear"
    batch = inputs()
    before = model(*batch).detach()
    replace(model, name, LoRA)
    after = model(*batch)
    assert not torch.allclose(after, before)
    after.square().sum().backward()
    adapter = model.get_submodule(name)
    for p in (adapter.down.weight, adapter.up.weight):
        assert p.grad is not None and p.grad.abs().max() > 0
    nn.init.zeros_(adapter.up.weight)
    torch.testing.assert_close(model(*batch), before, rtol=1e-4, atol=1e-5)


def test_a_linear_with_a_bias_of_its_own_counts(on, mixer, h):
    def with_bias(linear):
        other = nn.Linear(linear.in_features, linear.out_features)
        other.load_state_dict({"weight": linear.weight, "bias": torch.ones(linear.out_features)})
        return other

    before = mixer(h)
    for name in ("in_proj", "out_proj", "forward_scan.x_proj"):
        changed = copy.deepcopy(mixer)
        replace(changed, name, with_bias)
        assert not torch.allclose(changed(h), before), name
    replace(mixer, "out_proj", with_bias)
    torch.testing.assert_close(mixer(h), before + 1)


def test_dt_proj_without_a_bias(on, mixer, h):
    expected = copy.deepcopy(mixer)
    nn.init.zeros_(expected.forward_scan.dt_proj.bias)
    mixer.forward_scan.dt_proj.bias = None
    torch.testing.assert_close(mixer(h), expected(h))


@pytest.mark.parametrize("name, shape", [("dt_proj", (40, 2)), ("x_proj", (9, 48))])
def test_a_linear_of_another_size_is_refused(on, mixer, h, name, shape):
    """The kernels would read past the end of its output."""
    linear = nn.Linear(*shape[::-1], bias=name == "dt_proj")
    setattr(mixer.backward_scan, name, linear)
    with pytest.raises((ValueError, RuntimeError)):
        mixer(h)


# ---- weights that are computed ------------------------------------------------------------


@pytest.mark.parametrize("everywhere", [False, True])
def test_dynamic_quantisation(on, model, everywhere):
    """In one mixer, and of the whole model."""
    batch = inputs()
    with torch.no_grad():
        before = model(*batch)
        part = model if everywhere else model.blocks[1].mixer
        quantised = torch.ao.quantization.quantize_dynamic(part, {nn.Linear}, dtype=torch.qint8)
        if not everywhere:
            model.blocks[1].mixer, quantised = quantised, model
        after = quantised(*batch)
    assert not torch.equal(after, before)
    assert (after - before).abs().max() < 0.1 * before.abs().max()


def test_weight_norm_and_spectral_norm(on, mixer, h):
    before = mixer(h).detach()
    for name in LINEARS:
        parametrizations.weight_norm(mixer.get_submodule(name))
    torch.testing.assert_close(mixer(h), before, rtol=1e-4, atol=1e-5)
    mixer(h).sum().backward()
    for name in LINEARS:
        scale = mixer.get_submodule(name).parametrizations.weight.original0
        assert scale.grad.abs().max() > 0
        with torch.no_grad():
            scale.mul_(2)
    assert not torch.allclose(mixer(h), before)


def test_spectral_norm_iterates_once_a_call(on, model):
    """Nothing but the call itself computes the weight, which changes state in training."""
    linear = parametrizations.spectral_norm(model.blocks[0].mixer.in_proj)
    calls, step = [], linear.parametrizations.weight[0]
    step.register_forward_hook(lambda *args: calls.append(1))
    model.train()(*inputs())
    assert len(calls) == 1


@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_weight_norm_of_old(on, mixer, h):
    before = mixer(h).detach()
    nn.utils.weight_norm(mixer.out_proj)
    mixer.out_proj.weight_g.data.mul_(2)
    torch.testing.assert_close(mixer(h), 2 * before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["A_log", "D", "conv_weight", "conv_bias"])
def test_a_parametrised_tensor_of_a_direction(on, mixer, h, name):
    class Shifted(nn.Module):
        def forward(self, original):
            return original + 0.5

    expected = copy.deepcopy(mixer)
    with torch.no_grad():
        getattr(expected.forward_scan, name).add_(0.5)
    parametrize.register_parametrization(mixer.forward_scan, name, Shifted())
    torch.testing.assert_close(mixer(h), expected(h), rtol=1e-4, atol=1e-5)
    mixer(h).sum().backward()
    original = getattr(mixer.forward_scan.parametrizations, name).original
    assert original.grad.abs().max() > 0


@pytest.mark.parametrize("name", LINEARS)
def test_pruning(on, mixer, h, name):
    expected = copy.deepcopy(mixer)
    nn.init.zeros_(expected.get_submodule(name).weight)
    prune.l1_unstructured(mixer.get_submodule(name), "weight", amount=1.0)
    torch.testing.assert_close(mixer(h), expected(h), rtol=1e-4, atol=1e-5)


def test_replaced_weights(on, mixer, h):
    other = randomise(copy.deepcopy(mixer))
    weights = {name: p.detach() for name, p in other.named_parameters()}
    assert torch.equal(torch.func.functional_call(mixer, weights, h), other(h))


def test_a_subclass_of_tensor_is_called_through(on, mixer, h):
    """As quantised and distributed tensors are, which know what a linear layer does with them."""

    class Doubled(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            out = super().__torch_function__(function, types, args, kwargs or {})
            return out.as_subclass(torch.Tensor) * 2 if function is F.linear else out

    before = mixer(h)
    weight = mixer.out_proj.weight.detach().as_subclass(Doubled)
    mixer.out_proj.weight = nn.Parameter(weight, requires_grad=False)
    torch.testing.assert_close(mixer(h), 2 * before)


# ---- what shards, compiles and offloads ---------------------------------------------------


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_distributed_blocks_take_the_fused_path(native, how, model, one_rank, fused_calls):
    plain = copy.deepcopy(model)
    if how == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    else:
        mesh = init_device_mesh("cpu", (1,))
        for part in (*model.blocks, model):
            fully_shard(part, mesh=mesh)
        assert type(model.blocks[0].mixer.in_proj.weight) is not nn.Parameter
    fused_calls.clear()
    batch = inputs()
    after = model(*batch)
    assert len(fused_calls) == 3
    torch.testing.assert_close(after, plain(*batch), rtol=0, atol=0)
    after.sum().backward()


def test_a_direction_may_be_sharded_by_itself(on, model, one_rank):
    mixer, batch = model.blocks[1].mixer, inputs()
    before = model(*batch).detach()
    mesh = init_device_mesh("cpu", (1,))
    for part in (mixer.forward_scan, mixer.backward_scan, model):
        fully_shard(part, mesh=mesh)
    after = model(*batch)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-6)
    after.sum().backward()


def test_parameters_may_go_when_a_call_returns(on, mixer, h):
    """As offloading takes them: each module has its weights only while it is called."""
    expected = mixer(h).detach()
    for module in mixer.modules():
        own = dict(module.named_parameters(recurse=False))
        if not own:
            continue

        def fetch(module, args, own=own):
            for name, p in own.items():
                module._parameters[name] = nn.Parameter(p.detach().clone())

        def release(module, args, out, own=own):
            for name in own:
                module._parameters[name].untyped_storage().resize_(0)

        module.register_forward_pre_hook(fetch)
        module.register_forward_hook(release)
    with torch.no_grad():
        torch.testing.assert_close(mixer(h), expected, rtol=1e-5, atol=1e-6)


def test_compiled_whole_with_a_wrapper_inside(on, mixer, h):
    for name in ("in_proj", "forward_scan.dt_proj"):
        replace(mixer, name, LoRA)
    expected = mixer(h)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(h), expected, rtol=1e-5, atol=1e-6)


def test_a_compiled_graph_holds_the_kernels_of_the_fused_path(native, mixer, h):
    graphs = []

    def keep(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(mixer, fullgraph=True, backend=keep)(h)
    (graph,) = graphs
    called = {
        str(n.target) for g in graph.modules() for n in getattr(g, "graph", graph.graph).nodes
    }
    assert "dis_ssm.scan.default" in called or any("autograd_function" in n for n in called), called


def test_direction_is_a_module_that_is_called(on, mixer, h):
    calls = []
    for scan in (mixer.forward_scan, mixer.backward_scan):
        assert type(scan) is Direction
        scan.register_forward_hook(lambda m, args, out: calls.append(out[0].shape))
    mixer(h)
    assert calls == [(2, 7, 48)] * 2
