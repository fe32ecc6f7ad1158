"""One-step diffusion models in folders as the package diffusers writes them: reading them, and their only step."""

from __future__ import annotations

import hashlib
import importlib
import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from copgen_fast import files, schema
from copgen_fast.errors import UsageError, explain, in_one_line
from copgen_fast.generators._interface import expect_labels
from copgen_fast.ops.checks import expect_finite, expect_tensor

INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin")
LFS_POINTER = b"version https://git-lfs"
ROUNDING = 1e-3


class Folder:
    """A model's local folder: `model_index.json`, and a folder for each component.

    Nothing is downloaded, and no code of a pickle is run: weights are safetensors files or, where there are none,
    `.bin` files, of which PyTorch's `weights_only` takes tensors alone. Classes are those that we name, not those that
    the files name.

    Args:
        name: of the generator, for messages.
        pipelines: classes of diffusers' pipelines that it can be of.

    Raises:
        UsageError: it is missing, no such folder, or of another pipeline; the packages are not installed.
    """

    def __init__(self, name: str, given: str | Path | None, pipelines: Iterable[str]) -> None:
        self.name, self.diffusers = name, import_package("diffusers", name)
        if given is None:
            raise UsageError(f"generator {name} needs a folder as diffusers saves it: give --generator.weights FOLDER")
        self.path, self.used = Path(given), []
        if not self.path.is_dir():
            raise UsageError(f"{given} is no folder: generator {name} needs one as diffusers saves it")
        if not (self.path / INDEX).exists():
            wanted = f"generator {name} needs a folder as diffusers saves it"
            raise UsageError(f"{self.path / INDEX} is missing: {wanted}{self._instead()}")
        self.pipeline = self._class_name(INDEX, pipelines)

    def model_class(self, component: str, names: Iterable[str]) -> type[nn.Module]:
        """Which of some of diffusers' networks a component is; UsageError where it is missing or none of them."""
        self.locate(component, weights=False)
        return getattr(self.diffusers, self._class_name(f"{component}/config.json", names))

    def model(self, component: str, cls: type[nn.Module]) -> nn.Module:
        """A network in float32, with all its weights from the component's files.

        Raises:
            UsageError: the component is missing, has no weights, or does not hold this network.
        """
        folder, found = self.locate(component)
        options: dict[str, Any] = {**found, "output_loading_info": True}
        if issubclass(cls, self.diffusers.ModelMixin):
            options |= {"torch_dtype": torch.float32, "low_cpu_mem_usage": False}
        else:
            # Named, as a config.json could name an implementation of the hub's, which would be got and run.
            options |= {"dtype": torch.float32, "attn_implementation": "sdpa"}
        with torch.random.fork_rng(devices=[]):  # weights are initialised before they are read
            network, info = self._read(cls, folder, **options)
        if missing := sorted(info["missing_keys"]):
            raise UsageError(f"{folder} does not hold a {cls.__name__}: {len(missing)} weights missing: {missing[0]}")
        return network.eval().requires_grad_(False)

    def tokenizer(self, component: str, cls: type) -> Any:
        """A tokenizer; UsageError where it is missing or can't be read."""
        return self._read(cls, self.locate(component, weights=False)[0])

    def step(self, timestep: int | None = None, **changes: Any) -> OneStep:
        """The step of its scheduler, with changes of its configuration.

        Args:
            timestep: from which it goes; None: the one that the scheduler chooses.

        Raises:
            UsageError: there is none, or none that is `OneStep`.
        """
        folder = self.locate("scheduler", weights=False)[0]
        config = self._json("scheduler/scheduler_config.json")
        cls = getattr(self.diffusers, str(config.get("_class_name")), None)
        if not (isinstance(cls, type) and issubclass(cls, self.diffusers.SchedulerMixin)):
            raise UsageError(f"{folder} names {config.get('_class_name')!r}, which is no scheduler of diffusers")
        try:
            return one_step(cls.from_config(config, **changes), timestep)
        except Exception as error:
            raise UsageError(
                f"{folder}: {cls.__name__} can't make one step of this model ({in_one_line(error)})"
            ) from error

    def digest(self, *components: str) -> str:
        """SHA-256 (hex) of the files read so far, of some components or of all: their places and contents."""
        chosen = [path for path in sorted(set(self.used)) if not components or path.parent.name in components]
        lines = (f"{files.sha256(path)} {path.relative_to(self.path)}\n" for path in chosen)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def locate(self, component: str, weights: bool = True) -> tuple[Path, dict[str, Any]]:
        """A component's folder, and which of its weights to read, as diffusers' arguments; its files count as read.

        Safetensors files come before `.bin` files, and of each float32 before float16.

        Raises:
            UsageError: it is missing, or has no weights.
        """
        folder = self.path / component
        if not folder.is_dir():
            raise UsageError(f"{self.path} has no folder {component}, which a {self.pipeline} needs: get it whole")
        self.used += [*folder.glob("*.json"), *folder.glob("*.txt")]
        if not weights:
            return folder, {}
        for suffix in WEIGHTS:
            found = sorted(folder.glob(f"*model*{suffix}"))
            plain = [path for path in found if "." not in path.stem]
            if chosen := plain or [path for path in found if "fp16" in path.stem]:
                _expect_no_pointers(chosen)
                self.used += chosen
                return folder, {"variant": None if plain else "fp16", "use_safetensors": suffix == ".safetensors"}
        there = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
        raise UsageError(f"{folder} has no weights of PyTorch (.safetensors or .bin), but {there}: get it whole")

    def _class_name(self, place: str, names: Iterable[str]) -> str:
        name = self._json(place).get("_class_name")
        if name not in names:
            raise UsageError(f"{self.path / place} is of a {name}: generator {self.name} takes {' or '.join(names)}")
        return name

    def _instead(self) -> str:
        """What a folder without an index is, and what to do with it."""
        snapshots, saved = self.path / "snapshots", "and save the pipeline by save_pretrained"
        if snapshots.is_dir():
            return f", and one lies in {snapshots}"
        alone = sorted(path.name for suffix in WEIGHTS for path in self.path.glob(f"*{suffix}"))
        if lora := next((name for name in alone if "lora" in name), None):
            return f"; {lora} is a LoRA: load it into its base model's pipeline, call fuse_lora(), {saved}"
        if alone:
            return f"; load {alone[0]} in diffusers (from_single_file, or as its base model's unet), {saved}"
        return ""

    def _json(self, place: str) -> dict[str, Any]:
        path = self.path / place
        try:
            value = schema.check(schema.parse(files.read_bytes(path)), dict[str, Any])
        except ValueError as error:
            raise UsageError(f"{path} is not valid JSON ({error})") from error
        except UsageError as error:
            raise UsageError(f"{error}: generator {self.name} needs a folder as diffusers saves it") from error
        return value

    def _read(self, cls: type, folder: Path, **options: Any) -> Any:
        try:
            return cls.from_pretrained(str(folder), local_files_only=True, **options)
        except Exception as error:
            raise explain(error) or UsageError(f"{folder} holds no {cls.__name__} ({in_one_line(error)})") from error


@dataclass(frozen=True)
class OneStep:
    """A scheduler's only step, when it makes one, as numbers: it is linear.

    The model takes `scale * noise * z` at `timestep`; x = `of_output * output + of_noise * noise * z`.
    """

    timestep: float
    noise: float
    scale: float
    of_output: float
    of_noise: float


def one_step(scheduler: Any, timestep: int | None = None) -> OneStep:
    """The numbers of a scheduler, found by trying.

    Args:
        timestep: from which it goes; None: the one that it chooses.

    Raises:
        ValueError: it makes more than one step, draws noise, clips, or can't go from a given timestep.
    """

    def begin() -> None:
        try:
            scheduler.set_timesteps(**({"num_inference_steps": 1} if timestep is None else {"timesteps": [timestep]}))
        except TypeError as error:
            raise ValueError("it can't go from a given timestep, as LCMScheduler can") from error

    def tried(output: float, noise: float) -> float:
        begin()  # which forgets the step before
        sample = torch.full((1, 1, 2, 2), noise)
        scheduler.scale_model_input(sample, scheduler.timesteps[0])
        step = scheduler.step(torch.full_like(sample, output), scheduler.timesteps[0], sample)
        return step.prev_sample.double().mean().item()

    begin()
    if len(scheduler.timesteps) != 1:
        raise ValueError(f"it makes {len(scheduler.timesteps)} steps")
    first = scheduler.timesteps[0]
    scale = scheduler.scale_model_input(torch.ones(1, 1, 2, 2), first).double().mean().item()
    with torch.random.fork_rng(devices=[]):
        of_output, of_noise = tried(1.0, 0.0), tried(0.0, 1.0)
        expected = 30 * of_output - 20 * of_noise
        if not math.isclose(tried(30.0, -20.0), expected, rel_tol=ROUNDING, abs_tol=ROUNDING):
            raise ValueError("its step is not linear: it clips, or draws noise")
    return OneStep(float(first), float(scheduler.init_noise_sigma), scale, of_output, of_noise)


class OneStepModel(nn.Module):
    """A diffusion model's UNet and its only step: latents z, the start noise, to images.

    Subclasses have `image_shape`, `classes` and `images(z, labels)`.

    Attributes:
        latent_shape: (C, h, w) of the UNet.
    """

    prior = "normal"
    image_shape: tuple[int, int, int]
    classes: int

    def __init__(self, unet: nn.Module, step: OneStep) -> None:
        super().__init__()
        config = unet.config
        if config.out_channels != config.in_channels:
            raise UsageError(
                f"unet: expected as many channels out as in, got {config.out_channels} of {config.in_channels}"
            )
        side = config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        self.latent_shape = (config.in_channels, height, width)
        self.latent_dim = math.prod(self.latent_shape)
        self.unet, self.step = unet, step
        # Not read: for the digest, as these numbers decide images, too.
        self.register_buffer("step_numbers", torch.tensor(astuple(step), dtype=torch.float64))

    @property
    def checkpointed(self) -> bool:
        """Whether blocks compute their activations again in the backward rather than keep them."""
        return self.unet.is_gradient_checkpointing

    @checkpointed.setter
    def checkpointed(self, on: bool) -> None:
        again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # nothing in them is random
        for network in self.children():
            network.enable_gradient_checkpointing(again) if on else network.disable_gradient_checkpointing()

    def forward(self, z: Tensor, labels: Tensor | None = None) -> Tensor:
        """Latents [N, L] of the weights' dtype (and labels) to images; differentiable with respect to z.

        Raises:
            TypeError, ValueError: z of another dtype or shape; NaN or infinity (checked on the CPU alone); labels.
        """
        expect_tensor("z", z, ("N", self.latent_dim), {self.unet.dtype})
        expect_finite("z", z)
        labels = expect_labels(labels, len(z), self.classes)
        if not len(z):  # which attention can't take
            return z.new_zeros(0, *self.image_shape)
        return self.images(z, labels).clamp(-1, 1)

    def images(self, z: Tensor, labels: Tensor | None) -> Tensor:
        """Images [N, 3, H, W], yet to be clipped, of one latent or more."""
        raise NotImplementedError

    def denoised(self, z: Tensor, **conditions: Any) -> Tensor:
        """The step from latents [N, L] to [N, C, h, w], in the model's conditions."""
        step = self.step
        noise = step.noise * z.unflatten(1, self.latent_shape)
        timestep = torch.full((len(z),), step.timestep, device=z.device)  # float32: half precision has no 999
        output = self.unet(step.scale * noise, timestep, return_dict=False, **conditions)[0]
        return step.of_output * output + step.of_noise * noise


def _expect_no_pointers(paths: Iterable[Path]) -> None:
    for path in paths:
        with files.open_file(path) as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UsageError(f"{path} is a pointer of Git LFS, not the weights: run `git lfs pull` there")


def import_package(package: str, generator: str) -> ModuleType:
    """diffusers or transformers, with their messages off, which are not about the run."""
    try:
        module = importlib.import_module(package)
        logging = importlib.import_module(f"{package}.utils.logging")
    except ImportError as error:
        raise UsageError(
            f"generator {generator} needs the package {package}: pip install 'copgen_fast[diffusers]'"
        ) from error
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return module
