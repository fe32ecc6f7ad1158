"""Convert checkpoints from and to other code: python -m copgen_fast.convert {navigator,encoder} IN OUT [options]."""

from __future__ import annotations

import contextlib
import io
import pickle
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from copgen_fast.convert.encoder_names import Spelling, read_encoder, wrap, write_encoder
from copgen_fast.errors import CorruptArtifactError, UsageError, command
from copgen_fast.files import expect_file, sha256
from copgen_fast.options import parse
from copgen_fast.positives.navigator import Navigator
from copgen_fast.runtime import artifacts, latents, unpickle, weights
from copgen_fast.runtime.unpickle import Shell

SAMPLES = 10_000
_SUFFIXES = (".safetensors", ".pth", ".pt", ".pkl")


@dataclass(frozen=True)
class NavigatorJob:
    """Import a navigator T that the reference code saved (nn_walker: a whole pickled module). No pickled code runs.

    Written to RUN/navigator/navigator.safetensors it takes the place of the navigator stage, which is then skipped.
    For pairs from a released navigator:

        python -m copgen_fast.convert navigator FILE.pth RUN/navigator/navigator.safetensors
        python -m copgen_fast.train PRESET --out RUN --stages pairs

    PRESET's generator must have latents of T's width; a linear T also needs --navigator.kind linear.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """Checkpoint with a DataParallel(NonlinearWalk), the module alone, or its state dict."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """File to write, .safetensors."""
    overwrite: bool = False
    """Replace an existing file."""


@dataclass(frozen=True)
class EncoderJob:
    """Rename an encoder (ResNet-18 or -50): every tensor keeps its bits.

    copgen: RUN/pretrain/SOURCE/METHOD/encoder.safetensors. copgen-model: with the projection head, as in
    RUN/pretrain/SOURCE/METHOD/checkpoint.pt. supcon: the reference's SupConResNet, {"model": ...}. torchvision:
    resnet18 or resnet50 without fc. shortcut: the same but for that word, as in SupContrast and pytorch-cifar.
    sequential: its layers numbered, as in lightly's backbones. vissl: classy_state_dict with a trunk. detectron2:
    {"model": ..., "matching_heuristics"}.

    IN may have them in any dictionary and under any prefix, as MoCo, SimSiam, lightly, solo-learn, DataParallel and
    torch.compile do; what lies beside the encoder is left out and listed.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="IN")]
    """.safetensors, or what torch.save or pickle wrote."""
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")]
    """File to write: .safetensors (flat names), .pth, or, for detectron2, .pkl (numpy arrays)."""
    to: Spelling
    """Names to write."""
    prefix: str | None = None
    """What stands before the encoder's names in a file that holds several, as module.encoder_q. or teacher.backbone."""
    from_: Annotated[Spelling | Literal["auto"], tyro.conf.arg(name="from")] = "auto"
    """Names to read; auto recognises them."""
    parallel: bool = False
    """With --to supcon: encoder.module. names, as the reference writes and expects on several GPUs."""
    overwrite: bool = False
    """Replace an existing file."""


def check_paths(job: NavigatorJob | EncoderJob, suffixes: tuple[str, ...]) -> None:
    """Check that the input exists, and that no output is overwritten without --overwrite.

    Raises:
        UsageError: no such input, an existing output without --overwrite, or a suffix that is none of `suffixes`.
    """
    expect_file(job.source)
    if job.out.suffix not in suffixes:
        raise UsageError(f"{job.out}: expected a name that ends in {' or '.join(suffixes)}")
    if job.out.exists() and (not job.overwrite or job.out.is_dir()):
        raise UsageError(f"{job.out} exists: give --overwrite to replace it, or choose another name")


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """Add the file's name to errors about its content."""
    with unpickle.damage(str(path)):
        try:
            yield
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error


# Navigators


def walker(tree: Any) -> tuple[str, dict[str, Tensor]]:
    """The navigator in the content of a checkpoint.

    Returns:
        Its kind, `nonlinear` or `linear`, and Navigator's state dict.

    Raises:
        UsageError: there is none, or one of a form that Navigator does not have.
        CorruptArtifactError: it holds NaN or infinity.
    """
    found = tree.get("nn_walker", tree) if isinstance(tree, dict) else tree
    stored = weights.flatten(found)
    layers = [name.rpartition(".")[2] for name in leaf_modules(found)] if isinstance(found, Shell) else []
    if not any("walker." in name for name in stored) and not layers:
        raise UsageError(f"it holds no navigator (nn_walker), but {weights.describe(tree, weights.flatten(tree))}")
    names = [name[max(0, name.find("walker.")) :] for name in stored]
    kinds = {
        "nonlinear": ["walker.0.weight", "walker.0.bias", "walker.2.weight", "walker.2.bias"],
        "linear": ["walker.0.weight", "walker.0.bias", "walker.1.weight", "walker.1.bias"],
    }
    expected_layers = {"nonlinear": ["Linear", "ReLU", "Linear"], "linear": ["Linear", "Linear"]}
    kind = next((kind for kind, wanted in kinds.items() if sorted(wanted) == sorted(names)), None)
    if kind is None or layers not in ([], expected_layers[kind]):
        raise UsageError(f"it is no navigator of two layers: {', '.join([*names, *layers][:8])}")
    tensors = {name: weights.tensor(value) for name, value in zip(names, stored.values(), strict=True)}
    first = kinds[kind][0]
    if tensors[first].ndim != 2:
        raise UsageError(f"{first} is {list(tensors[first].shape)}, expected [hidden, latent]")
    hidden, latent_dim = tensors[first].shape  # the reference's --reduction_ratio makes them differ
    shapes = ((hidden, latent_dim), (hidden,), (latent_dim, hidden), (latent_dim,))
    for name, wanted in zip(kinds[kind], shapes, strict=True):
        tensor = tensors[name]
        if tuple(tensor.shape) != wanted or tensor.dtype != torch.float32:
            raise UsageError(f"{name} is {list(tensor.shape)} {tensor.dtype}, expected {list(wanted)} torch.float32")
        if not tensor.isfinite().all():
            raise CorruptArtifactError(f"{name} holds NaN or infinity")
    return kind, {name: tensors[name] for name in kinds[kind]}


def leaf_modules(module: Shell) -> list[str]:
    """Classes of the modules without children, in order. First call `state_dict`, which refuses a cycle."""
    children = [child for child in module.state.get("_modules", {}).values() if child is not None]
    return [name for child in children for name in leaf_modules(child)] if children else [module.of]


@torch.inference_mode()
def displacements(navigator: Navigator) -> dict[str, float]:
    """E||T(z)|| over seeded latents of each prior, to four digits, which are the same on every machine."""
    found = {}
    for prior in ("normal", "truncnorm"):
        z = latents.sample(prior, 0, (SAMPLES, navigator.latent_dim))
        found[prior] = round(navigator(z).norm(dim=1).double().mean().item(), 4)
    return found


def convert_navigator(job: NavigatorJob) -> None:
    """Convert a navigator of the reference code to ours, and print its properties."""
    check_paths(job, (".safetensors",))
    digest = sha256(job.source)
    with explained(job.source):
        kind, tensors = walker(weights.read(job.source).tree)
    hidden, latent_dim = tensors["walker.0.weight"].shape
    navigator = Navigator(latent_dim, kind, hidden=hidden)
    artifacts.load_strictly(navigator, tensors, job.source)
    lengths = displacements(navigator)
    record = {"kind": kind, "latent_dim": navigator.latent_dim, "source_sha256": digest, "displacement_norm": lengths}
    artifacts.write_bytes(job.out, encode(".safetensors", "navigator", tensors, record))
    print(f"{job.source}: a {kind} navigator, sha256 {digest}")
    for name, tensor in tensors.items():
        print(f"  {name} {list(tensor.shape)}, std {tensor.std():.4f}, largest {tensor.abs().max():.4f}")
    print(f"  E||T(z)|| over {SAMPLES} latents: {lengths['normal']} for N(0, I), {lengths['truncnorm']} for truncnorm")
    needed = ["--navigator.kind linear"] * (kind == "linear") + [f"--navigator.hidden {hidden}"] * (
        hidden != latent_dim
    )
    print(f"wrote {job.out}" + (f"; use it with {' '.join(needed)}" if needed else ""))


# Encoders


def encode_pickle(content: dict[str, Any]) -> bytes:
    """Pickle of protocol 2 that every version of numpy reads (numpy 2 names a module that numpy 1 lacks)."""
    data = pickle.dumps(content, protocol=2)
    return data.replace(b"cnumpy._core.multiarray\n_reconstruct\n", b"cnumpy.core.multiarray\n_reconstruct\n", 1)


def encode(suffix: str, spelling: str, tensors: dict[str, Tensor], record: dict[str, Any]) -> bytes:
    """The bytes of a file in the format of `suffix`.

    Raises:
        UsageError: numpy has no such dtype, or .pkl for others than detectron2.
    """
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    if suffix == ".safetensors":
        return artifacts.encode_tensors(tensors, record)
    if suffix == ".pkl":
        if spelling != "detectron2":
            raise UsageError(f".pkl is detectron2's; write {spelling} as .safetensors or .pth")
        if any(tensor.dtype == torch.bfloat16 for tensor in tensors.values()):
            raise UsageError("numpy has no bfloat16: write .pth")
        return encode_pickle(wrap(spelling, {name: tensor.numpy() for name, tensor in tensors.items()}))
    buffer = io.BytesIO()
    torch.save(wrap(spelling, tensors), buffer)
    return buffer.getvalue()


def convert_encoder(job: EncoderJob) -> None:
    """Rename an encoder's tensors from one spelling to another, and print what was left out or added."""
    check_paths(job, _SUFFIXES)
    digest = sha256(job.source)
    with explained(job.source):
        content = weights.read(job.source)
        found = read_encoder(content.tree, job.from_, job.prefix)
    tensors, notes = write_encoder(found, job.to, job.parallel)
    if content.unknown:
        notes.append(f"left out objects of {', '.join(content.unknown[:8])}")
    record = {"names": job.to, "encoder": found.config.name, "source_sha256": digest}
    artifacts.write_bytes(job.out, encode(job.out.suffix, job.to, tensors, record))
    stem = "7x7" if found.config.stem == "imagenet" else "3x3"
    print(
        f"{job.source}: {found.config.name} of width {found.config.width} with a {stem} stem in "
        f"{found.spelling} names, sha256 {digest}"
    )
    for note in (*found.notes, *notes):
        print(f"  {note}")
    print(f"wrote {job.out}: {len(tensors)} tensors in {job.to} names")


@command
def main(arguments: list[str] | None = None) -> int:
    """Convert one file; returns the exit code: 0, 2 for a usage error, else 1."""
    navigator = Annotated[NavigatorJob, tyro.conf.subcommand("navigator")]
    encoder = Annotated[EncoderJob, tyro.conf.subcommand("encoder")]
    job = parse(navigator | encoder, arguments, "python -m copgen_fast.convert")
    convert_navigator(job) if isinstance(job, NavigatorJob) else convert_encoder(job)
    return 0


if __name__ == "__main__":
    sys.exit(main())
