"""Area augment: the fused augmentation beside kornia, torchvision and its own reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.baselines import augment as baselines
from bench.harness import Call, Row
from bench.limits import Limit, copies, device_copy
from bench.options import Options
from bench.rows import Subject, compare
from copgen_fast.augmentations import POLICIES
from copgen_fast.ops import AugmentParams, AugmentPolicy, augment, backends
from copgen_fast.runtime import devices

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A batch of `batch` square images to views of the same size, by a named policy.

    Attributes:
        uint8: channels_last bytes come in, which take no gradient.
        drawing: each call draws its parameters too; elsewhere they are drawn beforehand.
        devices: where it is measured unasked.
    """

    policy: str
    batch: int
    side: int
    precision: str = "fp32"
    uint8: bool = False
    drawing: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")

    def __str__(self) -> str:
        kind = ", uint8 channels_last" if self.uint8 else ""
        return f"{self.policy} B={self.batch} {self.side}px{kind}{', drawing included' if self.drawing else ''}"


# A GPU alone takes the paper's batch: on a CPU the loops over samples would take minutes to say the same again.
CASES = (
    Case("simclr", 64, 128),
    Case("simclr", 64, 128, drawing=True),
    Case("simclr", 64, 128, uint8=True),
    Case("no-color", 64, 128),
    Case("infomin", 64, 128),
    Case("simclr", 512, 32),
    Case("simclr", 352, 128, devices=("cuda",)),
    Case("simclr", 352, 128, precision="fp16", devices=("cuda",)),
)

# What the policy loses: parts of the op, to see what each of them takes.
ABLATIONS = {
    "without hue": {"hue": 0.0},
    "without contrast": {"contrast": 0.0},
    "without colour": {"jitter": 0.0, "gray": 0.0},
    "without crop": {"crop_scale": None},
}


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device whose policy exists; of the ablation too where it is asked for."""
    device = devices.resolve(options.device, "fp32")
    for case in CASES:
        if device.type not in case.devices or case.policy not in POLICIES or options.only not in str(case):
            continue
        for direction in ("forward",) if case.uint8 else ("forward", "forward+backward"):
            yield from _Measurement(case, direction, device, options).against_peers()
    if options.ablate and options.only in f"{CASES[0]}, without":
        yield from _Measurement(CASES[0], "forward", device, options).without_parts()


class _Measurement:
    """One case in one direction: its inputs, drawn once, and what is made of them.

    The images are uniform noise, the worst content there is for code that branches on colours.
    """

    def __init__(self, case: Case, direction: str, device: torch.device, options: Options) -> None:
        self.case, self.direction, self.device, self.options = case, direction, device, options
        self.policy = POLICIES[case.policy]
        self.backend = backends()["augment"][device.type]
        self.dtype = _DTYPES[case.precision]
        shape = (case.batch, 3, case.side, case.side)
        seeded = torch.Generator().manual_seed(0)
        images = torch.rand(shape, generator=seeded)
        if case.uint8:
            self.images = (images * 255).byte().to(device, memory_format=torch.channels_last)
        else:
            self.images = images.to(device, self.dtype)
        self.gradient = torch.randn(shape, generator=seeded).to(device, self.dtype)
        self.params = self.draw(self.policy, generator=seeded)

    def draw(self, policy: AugmentPolicy, generator: torch.Generator | None = None) -> AugmentParams:
        size = (self.case.side,) * 2
        return AugmentParams.sample(self.case.batch, size, policy, generator=generator, device=self.device)

    def against_peers(self) -> Iterator[Row]:
        """A row for each peer, all measured together."""
        side, policy = self.case.side, self.policy
        if self.case.drawing:
            peers = baselines.drawing_peers(policy, side)
        else:
            peers = baselines.fixed_peers(policy, side, self.params)
        if self.backend == "reference":  # it would be compared with itself
            peers = {name: peer for name, peer in peers.items() if "reference backend" not in name}
        if self.direction != "forward" and policy.jitter:  # v2's hue overwrites what its backward needs, and raises
            peers = {name: peer for name, peer in peers.items() if " v2 " not in name}
        calls = {name: self.in_direction(peer) for name, peer in peers.items()}
        ours = self.in_direction(self.drawn_each_time if self.case.drawing else self.ours(policy, self.params))
        yield from self.compare({str(self.case): ours}, calls)

    def without_parts(self) -> Iterator[Row]:
        """A row for each part left out, with the whole op as its peer."""
        # From one seed: the parameters agree in all that is left.
        policies = {name: replace(self.policy, **lost) for name, lost in ABLATIONS.items()}
        drawn = {name: self.draw(p, torch.Generator().manual_seed(0)) for name, p in policies.items()}
        calls = {f"{self.case}, {name}": self.in_direction(self.ours(policies[name], drawn[name])) for name in policies}
        whole = self.draw(self.policy, torch.Generator().manual_seed(0))
        full = {"the whole op, same backend": self.in_direction(self.ours(self.policy, whole))}
        yield from self.compare(calls, full)

    def ours(self, policy: AugmentPolicy, params: AugmentParams) -> Callable[[Tensor], Tensor]:
        side, dtype = self.case.side, self.dtype
        return lambda images: augment(
            images, params, side, mean=policy.mean, std=policy.std, out_dtype=dtype, backend=self.backend
        )

    def drawn_each_time(self, images: Tensor) -> Tensor:
        return self.ours(self.policy, self.draw(self.policy))(images)

    def in_direction(self, run: Callable[[Tensor], Tensor]) -> Call:
        """The call to time: views alone, or also the gradient with respect to the images."""
        if self.direction == "forward":
            return lambda: run(self.images)
        leaf = self.images.clone().requires_grad_()
        return lambda: torch.autograd.grad(run(leaf), leaf, self.gradient)

    def compare(self, ours: dict[str, Call], peers: dict[str, Call]) -> Iterator[Row]:
        """Rows of each of ours (named by its case) with each peer (by its name)."""
        subject = Subject("augment", self.backend, self.case.precision, self.direction)
        return compare(subject, ours, peers, self.limit(), self.options, self.device)

    def limit(self) -> Limit:
        """Images to views and, backward, the views' gradient to the images'; on a GPU the fewest bytes for it."""
        forward = self.direction == "forward"
        if self.device.type == "cuda":
            what = "crops read, views written" + (
                "" if forward else "; gradient and crops read, images' gradient written"
            )
            return device_copy(what, self.bytes_to_move(), self.device)
        views, grad_images = torch.empty_like(self.gradient), torch.empty_like(self.gradient)
        if forward:
            return copies("the images once", [(views, self.images)])
        return copies("the images twice, forward and backward", [(views, self.images), (grad_images, self.gradient)])

    def bytes_to_move(self) -> int:
        """Forward the crops are read once and the views written. Backward the views' gradient and the crops are
        read, and the images' gradient is written."""
        area = int((self.params.crop[:, 2] * self.params.crop[:, 3]).sum())
        crops, views = 3 * area * self.images.element_size(), self.gradient.nbytes
        forward = crops + views
        return forward if self.direction == "forward" else forward + views + crops + self.images.nbytes
