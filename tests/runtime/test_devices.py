import pytest
import torch

from copgen_fast import augmentations
from copgen_fast.augmentations import JigsawParams
from copgen_fast.errors import UsageError
from copgen_fast.ops import AugmentParams
from copgen_fast.runtime import devices
from copgen_fast.training.cuda_graph import tensors


def test_auto_takes_what_is_there():
    assert devices.resolve("auto", "fp32").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert devices.resolve("cpu", "bf16") == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "cuda:99", ""])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UsageError, match=f"--device {name} is not usable here"):
        devices.resolve(name, "fp32")


def test_fp16_on_the_cpu_is_refused():
    with pytest.raises(UsageError, match="fp16 needs a CUDA device: choose fp32 or bf16"):
        devices.resolve("cpu", "fp16")


@pytest.mark.parametrize(("capability", "chosen"), [((6, 1), "fp32"), ((7, 5), "fp16"), ((8, 6), "bf16")])
def test_auto_precision_is_what_the_matrix_units_take(monkeypatch, capability, chosen):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    assert devices.resolve_precision("auto", torch.device("cuda")) == chosen
    assert devices.resolve_precision("auto", torch.device("cpu")) == "fp32"
    assert devices.resolve_precision("bf16", torch.device("cpu")) == "bf16", "what is asked for stays"


def test_bf16_on_turing_is_refused(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "RTX 2080 Ti")
    with pytest.raises(UsageError, match="bf16 needs a GPU of sm_80 or newer, RTX 2080 Ti has none: choose fp16"):
        devices.resolve("cuda", "bf16")


def test_values_are_sent_whole():
    params = AugmentParams.neutral(3, 8)
    sent = devices.send(params, torch.device("cpu"))
    assert all(torch.equal(*both) for both in zip(tensors(sent), tensors(params), strict=True))
    assert params.device == torch.device("cpu")


def test_a_batch_of_parameters_goes_in_one_transfer():
    policy, generator = augmentations.get("infomin"), torch.Generator()
    for sent in (
        JigsawParams.sample(5, (9, 8), policy, generator),
        AugmentParams.sample(5, (40, 40), policy, generator=generator),
    ):
        arrived = devices.together(sent, torch.device("cpu"))
        assert type(arrived) is type(sent)
        parts = list(tensors(arrived))
        assert all(torch.equal(*both) for both in zip(parts, tensors(sent), strict=True))
        assert len({x.untyped_storage().data_ptr() for x in parts}) == 1
        assert all(x.data_ptr() % 16 == 0 and x.is_contiguous() for x in parts)


def test_autocast_computes_in_its_precision():
    one = torch.ones(2, 2)
    with devices.autocast(torch.device("cpu"), "bf16"):
        assert (one @ one).dtype == torch.bfloat16
    with devices.autocast(torch.device("cpu"), "fp32"):
        assert (one @ one).dtype == torch.float32
    assert not devices.grad_scaler(torch.device("cpu"), "bf16").is_enabled()


@pytest.mark.parametrize(
    ("precision", "generator", "scaled"),
    [
        ("fp16", torch.float32, True),
        ("bf16", torch.float16, True),
        ("fp32", torch.float16, True),
        ("bf16", torch.bfloat16, False),
        ("fp32", torch.float32, False),
    ],
)
def test_the_loss_is_scaled_where_anything_is_fp16(monkeypatch, precision, generator, scaled):
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device, enabled: (device, enabled))
    assert devices.grad_scaler(torch.device("cuda"), precision, generator) == ("cuda", scaled)


def test_float32_convolutions_are_in_float32_for_a_while():
    cudnn = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
    assert before == ("tf32", "tf32") and cudnn.allow_tf32
    with devices.full_float32():
        assert not cudnn.allow_tf32, "other code can still read it"
        assert cudnn.conv.fp32_precision in ("ieee", "none")
    assert (cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision) == before and cudnn.allow_tf32


@pytest.mark.parametrize("holder", ["common", "conv"])
def test_precisions_that_somebody_has_set_are_put_back(monkeypatch, holder):
    cudnn = torch.backends.cudnn
    monkeypatch.setattr(
        cudnn if holder == "common" else cudnn.rnn, "fp32_precision", {"common": "tf32", "conv": "ieee"}[holder]
    )
    with devices.full_float32():
        assert cudnn.conv.fp32_precision == cudnn.rnn.fp32_precision == "ieee"
    assert cudnn.conv.fp32_precision == "tf32"
    assert cudnn.rnn.fp32_precision == {"common": "tf32", "conv": "ieee"}[holder]


def test_the_runs_gpu_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):  # torch.cuda.set_device raises for one without a number
        devices.make_current(torch.device(name))
    assert chosen == [torch.device("cuda:1")]
