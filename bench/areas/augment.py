"""Area augment: the fused augmentation beside kornia, torchvision and its PyTorch reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bench.baselines import augment as baselines
from bench.harness import Call, captured
from bench.limits import Limit, copies, device_copy, instructions_per_pixel
from bench.rows import DIRECTIONS, DTYPES, Candidate, Options, Row, chosen, compare, in_direction
from copgen_fast.augmentations import POLICIES
from copgen_fast.ops import AugmentParams, AugmentPolicy, augment, backends
from copgen_fast.runtime import devices


@dataclass(frozen=True)
class Case:
    """A batch of `batch` square images to views of the same size, by a named policy.

    Attributes:
        uint8: channels_last bytes come in, which take no gradient.
        drawing: each call draws its parameters too; elsewhere they are drawn beforehand.
        devices: device types it is measured on.
        graph: as a CUDA graph, beside the same call launched by the host.
    """

    policy: str
    batch: int
    side: int
    precision: str = "fp32"
    uint8: bool = False
    drawing: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    graph: bool = False

    def __str__(self) -> str:
        kinds = {"uint8 channels_last": self.uint8, "drawing included": self.drawing, "CUDA graph": self.graph}
        return ", ".join([f"{self.policy} B={self.batch} {self.side}px", *(name for name, it in kinds.items() if it)])


# The paper's batch on a GPU alone: on a CPU the per-sample loops would take minutes for the same ratios.
CASES = (
    Case("simclr", 64, 128),
    Case("simclr", 64, 128, drawing=True),
    Case("simclr", 64, 128, uint8=True),
    Case("no-color", 64, 128),
    Case("infomin", 64, 128),
    Case("simclr", 512, 32),
    Case("simclr", 352, 128, devices=("cuda",)),
    Case("simclr", 352, 128, precision="fp16", devices=("cuda",)),
    Case("simclr", 352, 128, precision="fp16", devices=("cuda",), graph=True),
)

HOST = "same call, launched by the host"

# Parts of the op, and the policy's fields that leave each out.
ABLATIONS = {
    "without hue": {"hue": 0.0},
    "without contrast": {"contrast": 0.0},
    "without colour": {"jitter": 0.0, "gray": 0.0},
    "without crop": {"crop_scale": None},
}


def rows(options: Options) -> Iterator[Row]:
    """Rows of every case for this device, and with `options.ablate` of the ablation."""
    for case, device in chosen(CASES, options):
        for direction in DIRECTIONS[:1] if case.uint8 else DIRECTIONS:
            yield from Measurement(case, direction, device, options).against_peers()
    if options.ablate and options.only in f"{CASES[0]}, without":
        device = devices.resolve(options.device, "fp32")
        yield from Measurement(CASES[0], "forward", device, options).without_parts()


class Measurement:
    """One case in one direction: inputs, drawn once, and the calls on them.

    The images are uniform noise, the worst case for code that branches on colours.
    """

    def __init__(self, case: Case, direction: str, device: torch.device, options: Options) -> None:
        self.case, self.direction, self.device, self.options = case, direction, device, options
        self.policy = replace(POLICIES[case.policy], rand_augment=None)  # which the peers lack; it has its own area
        self.backend = backends()["augment"][device.type]
        self.dtype = DTYPES[case.precision]
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
        if self.case.graph:
            own = self.ours(policy, self.params)
            yield from self.compare({str(self.case): own}, {HOST: own})
            return
        if self.case.drawing:
            peers = baselines.drawing_peers(policy, side)
        else:
            peers = baselines.fixed_peers(policy, side, self.params)
        if self.backend == "reference":  # it would be compared with itself
            peers = {name: peer for name, peer in peers.items() if "reference backend" not in name}
        if self.direction != "forward" and policy.jitter:  # v2's hue overwrites what its backward needs, and raises
            peers = {name: peer for name, peer in peers.items() if " v2 " not in name}
        ours = self.drawn_each_time if self.case.drawing else self.ours(policy, self.params)
        yield from self.compare({str(self.case): ours}, peers)

    def without_parts(self) -> Iterator[Row]:
        """A row for each part left out, with the whole op as its peer."""

        def seeded(policy: AugmentPolicy) -> baselines.Peer:  # from one seed: all other parameters agree
            return self.ours(policy, self.draw(policy, torch.Generator().manual_seed(0)))

        ours = {f"{self.case}, {name}": seeded(replace(self.policy, **lost)) for name, lost in ABLATIONS.items()}
        yield from self.compare(ours, {"the whole op, same backend": seeded(self.policy)})

    def ours(self, policy: AugmentPolicy, params: AugmentParams) -> baselines.Peer:
        side, dtype = self.case.side, self.dtype
        return lambda images: augment(
            images, params, side, mean=policy.mean, std=policy.std, out_dtype=dtype, backend=self.backend
        )

    def drawn_each_time(self, images: Tensor) -> Tensor:
        return self.ours(self.policy, self.draw(self.policy))(images)

    def compare(self, ours: dict[str, baselines.Peer], peers: dict[str, baselines.Peer]) -> Iterator[Row]:
        """Rows of each of ours (named by its case) with each peer (by its name)."""

        def call(run: Callable[[Tensor], Tensor]) -> Call:
            return in_direction(self.direction, run, [self.images], self.gradient)

        columns, bound = (self.backend, self.case.precision, self.direction), self.limit()
        graph = self.case.graph
        mine = {case: captured(call(run)) if graph else call(run) for case, run in ours.items()}
        candidates = [Candidate("augment", case, *columns, run, bound, graph) for case, run in mine.items()]
        calls = {name: call(run) for name, run in peers.items()}
        return compare(candidates, calls, self.options, self.device)

    def limit(self) -> Limit:
        """Copying images to views and, backward, the views' gradient to the images'.

        On a GPU the longer of the fewest bytes' time and the instructions'.
        """
        forward = self.direction == "forward"
        if self.device.type == "cuda":
            backward = "" if forward else "; gradient and crops read, images' gradient written"
            turing = torch.cuda.get_device_capability(self.device) < (8, 0)
            instructions = self.instructions_to_issue(instructions_per_pixel("sm_75" if turing else "sm_90"))
            what = f"crops read, views written{backward}"
            return device_copy(what, self.bytes_to_move(), self.device, instructions)
        views, grad_images = torch.empty_like(self.gradient), torch.empty_like(self.gradient)
        if forward:
            return copies("the images once", [(views, self.images)])
        return copies("the images twice, forward and backward", [(views, self.images), (grad_images, self.gradient)])

    def bytes_to_move(self) -> int:
        """Forward the crops are read once and the views written. Backward the views' gradient and the crops are
        read, and the images' gradient is written."""
        crops, views = 3 * self.cropped() * self.images.element_size(), self.gradient.nbytes
        forward = crops + views
        return forward if self.direction == "forward" else forward + views + crops + self.images.nbytes

    def instructions_to_issue(self, per_pixel: dict[str, float]) -> float:
        """Of threads, by each kernel's count: of views with colour jitter alone, whose colours take nearly all of them,
        and for the gradient of the images in the crops alone."""
        made = int(self.params.jitter.sum()) * self.case.side**2
        forward = made * (per_pixel["pivot_parts_kernel"] + per_pixel["forward_kernel"])
        if self.direction == "forward":
            return forward
        return forward + made * per_pixel["resized_grad_kernel"] + self.cropped() * per_pixel["gather_kernel"]

    def cropped(self) -> int:
        """Pixels of all crops."""
        return int((self.params.crop[:, 2] * self.params.crop[:, 3]).sum())
