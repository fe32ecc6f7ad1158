"""Write the tables of measurements into README.md and pages of docs, and a picture, from bench/results/*.json.

    python -m docs.make_speed_tables      # from the repository's root

A table stands between the lines `<!-- speed: NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "speed.md", ROOT / "docs" / "methods.md")
PAIRS = 512  # of an epoch in area loader
Cells = tuple[str, ...]


def rows_of(area: str, of: str = "cpu") -> list[dict]:
    """All rows of an area's results of a device."""
    return json.loads((ROOT / "bench" / "results" / f"{area}-{of}.json").read_text())["rows"]


def row(
    area: str,
    case: str,
    peer: str = "",
    direction: str = "",
    precision: str = "fp32",
    backend: str = "",
    of: str = "cpu",
) -> dict:
    """The first row of an area's results of a device for the case whose other names start as given."""
    wanted = {"peer": peer, "direction": direction, "precision": precision, "backend": backend}
    fits = (
        r for r in rows_of(area, of) if r["case"] == case and all(r[name].startswith(wanted[name]) for name in wanted)
    )
    return next(r for r in fits if direction != "forward" or r["direction"] == "forward")


def time(ms: float) -> str:
    return f"{ms / 1000:.3g} s" if ms >= 1000 else f"{ms:.3g} ms"


def rate(ms: float, count: int, digits: int = 3) -> str:
    """Things a second, where `count` of them take `ms`."""
    return f"{float(f'{1000 * count / ms:.{digits}g}'):,.0f}"


def ratio(row: dict) -> str:
    """Times as fast as the peer, with the 95 % interval; not quoted where that leaves open which of both is faster."""
    low, high = row["ratio_low"], row["ratio_high"]
    if low < 1 < high:
        return "undecided"
    digits = 0 if row["ratio"] >= 10 else 2 if row["ratio"] < 1 else 1
    return f"{row['ratio']:.{digits}f}x ({low:.{digits}f} to {high:.{digits}f})"


def against(name: str, row: dict) -> Cells:
    """Time, the peer's time, their ratio and the share of the limit."""
    return time(row["ours_ms"]), f"{name} {time(row['peer_ms'])}".strip(), ratio(row), f"{row['of_limit']:.0%}"


def readme() -> list[Cells]:
    navigator = [row("navigator", "bigbigan B=8 128px", precision=dtype) for dtype in ("fp32", "bf16")]
    kornia = row("augment", "simclr B=64 128px", "kornia", "forward+backward")
    nce = row("info_nce", "N=4096 D=128", "PyTorch", "forward+backward")
    jpeg, decoded = row("loader", "jpeg 128px"), row("loader", "jpeg 128px, decoded only", precision="uint8")
    pretrain = [row("pretrain", "resnet18 B=32 128px", precision=dtype) for dtype in ("fp32", "bf16")]

    def step(name: str, rows: list[dict]) -> Cells:
        fp32, bf16 = rows
        return (
            name,
            f"{time(fp32['ours_ms'])}; bfloat16 {time(bf16['ours_ms'])}",
            f"the reference's form, {time(fp32['peer_ms'])}",
            f"{ratio(fp32)}; {ratio(bf16)}",
        )

    return [
        ("", "this", "beside", "ratio"),
        step("navigator step, BigBiGAN-128, 8 latents", navigator),
        (
            "augmentation of 64 images, 128 px, forward + backward",
            time(kornia["ours_ms"]),
            f"kornia {time(kornia['peer_ms'])}",
            ratio(kornia),
        ),
        (
            "InfoNCE, 4096 pairs, forward + backward",
            f"{time(nce['ours_ms'])}, {nce['peak_mb']:.0f} MB",
            f"PyTorch {time(nce['peer_ms'])}, {nce['peer_peak_mb']:.0f} MB",
            ratio(nce),
        ),
        (
            f"{PAIRS} JPEG pairs, 128 px, augmented; only read",
            f"{time(jpeg['ours_ms'])}; {time(decoded['ours_ms'])}",
            f"Pillow, torchvision {time(jpeg['peer_ms'])}; {time(decoded['peer_ms'])}",
            f"{ratio(jpeg)}; {ratio(decoded)}",
        ),
        step("pretraining step, ResNet-18, 128 px, 32 pairs", pretrain),
    ]


def steps() -> list[Cells]:
    reference, published = "the reference code's form", "as published"
    lines = {
        "navigator step, BigBiGAN-128 at full size, 8 latents": (reference, row("navigator", "bigbigan B=8 128px")),
        "... in bfloat16, 8 latents": (reference, row("navigator", "bigbigan B=8 128px", precision="bf16")),
        "BigBiGAN-128, 8 images": (published, row("generator", "bigbigan B=8 128px exact", "", "forward")),
        "... with the gradient with respect to z": (
            published,
            row("generator", "bigbigan B=8 128px exact", "", "forward+backward"),
        ),
        "BigGAN-deep-128, 8 images": (
            "the package's form",
            row("generator", "biggan-deep B=8 128px exact", "", "forward"),
        ),
        "StyleGAN2 at 256 px and full width, 2 images": (
            published,
            row("generator", "stylegan2 B=2 256px exact", "", "forward"),
        ),
        "... with the gradient of z": (
            published,
            row("generator", "stylegan2 B=2 256px exact", "", "forward+backward"),
        ),
        "pretraining step, ResNet-18 at 128 px, 32 pairs": (reference, row("pretrain", "resnet18 B=32 128px")),
        "... in bfloat16": (reference, row("pretrain", "resnet18 B=32 128px", precision="bf16")),
        "pretraining step, ResNet-18 of width 16 at 32 px, 128 pairs": (
            reference,
            row("pretrain", "resnet18/16 B=128 32px"),
        ),
    }
    return [
        ("", "this", "compared with", "ratio", "of its limit"),
        *((name, *against(*line)) for name, line in lines.items()),
    ]


def gpu() -> list[Cells]:
    """Rows of the GPU that has run the benchmarks."""
    both, half, graph = "forward+backward", "fp16", "CUDA graph"
    on = partial(row, of="gpu")
    sampling, pairs = "bigbigan B=256 128px", "resnet50 B=224 128px"
    views, nce = "simclr B=352 128px", "N=16384 D=128"
    step = partial(on, "pretrain", pairs, "reference form, fp32, views at hand")
    augmented, losses = partial(on, "augment", views, "kornia 0.9.0, same"), partial(on, "info_nce", nce, "PyTorch")
    published, reference, host = "as published, float32,", "the reference code's form, float32,", "launched by the host"
    lines = [
        ("BigBiGAN-128, 256 images, float16", published, on("generator", f"{sampling} half", "", "forward", half)),
        ("... and the gradient of z", published, on("generator", f"{sampling} half", "", both, half)),
        ("... in float32", published, on("generator", f"{sampling} exact", "", "forward")),
        ("... in float32, and the gradient of z", published, on("generator", f"{sampling} exact", "", both)),
        ("pretraining step, ResNet-50, 224 pairs, float16", reference, step("", half, "pytorch")),
        ("... with `--pretrain.graph`", reference, step("", half, graph)),
        ("... in bfloat16", reference, step("", "bf16", "pytorch")),
        ("... in bfloat16, with `--pretrain.graph`", reference, step("", "bf16", graph)),
        ("augmentation, 352 images, float16", "kornia", augmented("forward", half)),
        ("... forward + backward", "kornia", augmented(both, half)),
        ("... as a CUDA graph", host, on("augment", f"{views}, {graph}", "", "forward", half)),
        ("... as a CUDA graph, forward + backward", host, on("augment", f"{views}, {graph}", "", both, half)),
        ("InfoNCE, 16,384 pairs, float16", "PyTorch", losses("forward", half)),
        ("... forward + backward", "PyTorch", losses(both, half)),
        ("... in float32", "PyTorch", losses("forward")),
        ("... in float32, forward + backward", "PyTorch", losses(both)),
    ]
    table = [("on an H100, 128 px", "this", "compared with", "ratio", "of its limit")]
    return [*table, *((name, *against(*line)) for name, *line in lines)]


def augment() -> list[Cells]:
    case, both = "simclr B=64 128px", ("forward", "forward+backward")
    peers = {
        "kornia 0.9.0": "kornia 0.9.0, same",
        "torchvision 0.29.1, image by image": "torchvision 0.29.1 per",
        "torchvision 0.29.1 v2, one draw for the whole batch": "torchvision 0.29.1 v2",
        "this operator's PyTorch reference": "copgen_fast",
    }
    ours = [row("augment", case, "", direction) for direction in both]
    table = [("", *both), ("this operator, C++", *(time(r["ours_ms"]) for r in ours))]
    for name, peer in peers.items():
        cells = []
        for direction in both:
            try:
                found = row("augment", case, peer, direction)
                cells.append(f"{time(found['peer_ms'])}, {ratio(found)}")
            except StopIteration:
                cells.append("")
        table.append((name, *cells))
    return [*table, ("limit: copying the images", *(time(r["limit_ms"]) for r in ours))]


def info_nce() -> list[Cells]:
    cases, direction = ("N=224 D=128", "N=1024 D=128", "N=4096 D=128", "N=16384 D=128"), "forward+backward"
    ours = [row("info_nce", case, "", direction) for case in cases]
    table = [
        ("", "N = 224", "N = 1024", "N = 4096", "memory at 4096", "N = 16384"),
        (
            "this operator, C++",
            *(time(r["ours_ms"]) for r in ours[:3]),
            f"{ours[2]['peak_mb']:.0f} MB",
            f"{time(ours[3]['ours_ms'])}, {ours[3]['peak_mb']:.0f} MB",
        ),
    ]
    peers = {
        "PyTorch, written plainly": "PyTorch",
        "lightly 1.6.0": "lightly",
        "SupConLoss of the reference code": "SupConLoss",
        "this operator in PyTorch, a chunk of rows at a time": "copgen_fast",
    }
    for name, peer in peers.items():
        found = [row("info_nce", case, peer, direction) for case in cases[:3]]
        cells = [f"{time(r['peer_ms'])}, {ratio(r)}" for r in found]
        last = ""
        if peer == "copgen_fast":
            last = f"{time(ours[3]['peer_ms'])}, {ours[3]['peer_peak_mb']:.0f} MB"
        table.append((name, *cells, f"{found[2]['peer_peak_mb']:.0f} MB", last))
    limits = [time(r["limit_ms"]) for r in ours]
    return [*table, ("limit: the products at the rate of a large one", *limits[:3], "", limits[3])]


def cond_norm() -> list[Cells]:
    table = [("8 images, channels last", "forward", "PyTorch's two operators", "forward + backward", "PyTorch's")]
    for channels, side in ((1536, 4), (1536, 8), (768, 16), (384, 32), (192, 64), (96, 128)):
        cells = []
        for direction in ("forward", "forward+backward"):
            found = row("cond_norm", f"B=8 C={channels} {side}px NHWC", "PyTorch", direction)
            cells += [time(found["ours_ms"]), f"{time(found['peer_ms'])}, {ratio(found)}"]
        table.append((f"{channels} channels, {side} px", *cells))
    return table


def conv3x3() -> list[Cells]:
    table = [("64 images, channels last", "forward", "PyTorch's", "forward + backward", "PyTorch's", "of its limit")]
    for channels, side in ((64, 32), (128, 16), (256, 8), (512, 4)):
        cells = []
        for direction in ("forward", "forward+backward"):
            found = row("conv3x3", f"B=64 C={channels} {side}px", "PyTorch", direction)
            cells += [time(found["ours_ms"]), f"{time(found['peer_ms'])}, {ratio(found)}"]
        table.append((f"{channels} channels, {side} px", *cells, f"{found['of_limit']:.0%}"))
    return table


def loader() -> list[Cells]:
    table = [("", "plain (PyTorch, Pillow)", "DALI on the CPU", "files, Pillow, torchvision", "ratios")]
    for codec in ("png", "jpeg", "raw"):
        for suffix, what in (("", "augmented views"), (", decoded only", "uint8 images")):
            found = [row("loader", f"{codec} 128px{suffix}", precision="", backend=name) for name in ("plain", "dali")]
            rates = [rate(r["ours_ms"], PAIRS) for r in found]
            ratios = ", ".join(ratio(r) for r in found)
            table.append((f"{codec} to {what}", *rates, rate(found[0]["peer_ms"], PAIRS), ratios))
    return table


def rand_augment() -> list[Cells]:
    """RandAugment beside torchvision's functions, by the same operations, and its class, which draws for itself."""
    cases = {"infomin B=64 128px": "64 images of 128 px", "infomin B=512 32px": "512 images of 32 px"}
    table = [("", "this", "torchvision, for each PIL picture", "for each tensor (always bilinear)")]
    for case, name in cases.items():
        for suffix, more in (("", ""), (", all drawn and applied", ", drawing included, all that is drawn applied")):
            found = [r for r in rows_of("rand_augment") if r["case"] == case + suffix]
            found.sort(key=lambda r: "PIL" not in r["peer"])
            table.append(
                (name + more, time(found[0]["ours_ms"]), *(f"{time(r['peer_ms'])}, {ratio(r)}" for r in found))
            )
    return table


def images() -> list[Cells]:
    """Real images a second."""
    reading, packing = "ImageFolder, DataLoader", "a loop of Pillow in two processes"
    names = {
        "jpeg 128px read, B=64": ("packed as JPEG, read", reading),
        "raw 128px read, B=64": ("packed raw, read", reading),
        "jpeg 128px packed": ("packing as JPEG", packing),
    }
    table = [("photographs a second", "this", "compared with", "ratio")]
    for case, (name, peer) in names.items():
        found = row("images", case, precision="uint8")
        rates = rate(found["ours_ms"], PAIRS, 2), f"{peer} {rate(found['peer_ms'], PAIRS, 2)}"
        table.append((name, *rates, ratio(found)))
    return table


def probes() -> list[Cells]:
    """Linear evaluations beside the reference code's form."""
    epoch, grid = "linear-augmented resnet18 128px, 256 images", "linear-grid resnet18/16 32px, 2000 images"
    lines = [
        ("an epoch of `linear-augmented`, ResNet-18, 256 photographs at 128 px", row("probes", epoch)),
        ("... in bfloat16", row("probes", epoch, precision="bf16")),
        ("`linear-grid` to its answer, ResNet-18 of width 16, 2,000 images of 32 px", row("probes", grid)),
    ]
    table = [("", "this", "the reference code's form", "ratio", "of its limit")]
    return [*table, *((name, *against("", found)) for name, found in lines)]


def codecs() -> list[Cells]:
    names = {"png": "`png` (default, lossless)", "jpeg": "`jpeg` (quality 95, 4:4:4)", "raw": "`raw`"}
    table = [("`--pairs.codec`", "bytes an image", "encoded, images/s on a core", "decoded", "1.3M pairs, encoding")]
    for codec, name in names.items():
        ways = [row("codecs", f"{codec} B=32 128px", "", way, "uint8") for way in ("encode", "decode")]
        size, disk, hours = re.search(r"\((\d+) bytes.*: (\d+ GB), (\S+ h) of a core", ways[0]["limit"]).groups()
        table.append((name, f"{int(size):,}", *(rate(r["ours_ms"], 32) for r in ways), f"{disk}, {hours} of a core"))
    peers = (rate(r["peer_ms"], 32) for r in (row("codecs", "png B=32 128px", "", w, "uint8") for w in ("enc", "dec")))
    return [*table, ("Pillow's default PNG, for comparison", "", *peers, "")]


def methods() -> list[Cells]:
    """A step's time, in parts of SimCLR's and lightly's with their intervals."""

    def part(row: dict) -> str:
        low, high = 1 / row["ratio_high"], 1 / row["ratio_low"]
        return f"{1 / row['ratio']:.2f} ({low:.2f} to {high:.2f})"

    table = [("", "a step", "/ SimCLR's", "/ lightly's", "/ lightly's, 8 px")]
    for name in ("nnclr", "moco", "negft", "negft negatives=queue", "simsiam", "byol"):
        case = f"{name} B=64 32px"
        found, theirs = row("methods", case, "simclr"), ["", ""]
        if not name.startswith("negft"):  # which lightly has not
            of_heads = row("methods-heads", f"{name} B=64 8px", "lightly")
            theirs = [part(row("methods", case, "lightly")), part(of_heads)]
        table.append((f"`{name}`", time(found["ours_ms"]), part(found), *theirs))
    return table


def online() -> list[Cells]:
    """Two steps on pairs drawn while training, and in parts of it the same steps on others."""
    names = {"digits": "digits", "cifar10_dcgan": "CIFAR-10's DCGAN", "bigbigan": "BigBiGAN's layers, width 16"}
    peers = ("same steps, PNG", "same steps, raw", "same steps, batch", "no steps", "generation")
    columns = ("PNG shards", "raw shards", "pairs at hand", "writing the pairs as PNG", "generating them")
    table = [("generator", "online", *columns)]
    for name, shown in names.items():
        found = [row("online", f"{name}, resnet18/16 B=128, 2 steps", peer) for peer in peers]
        intervals = (f"{r['ratio']:.2f} ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})" for r in found)
        table.append((shown, time(found[0]["ours_ms"]), *intervals))
    return table


def roofline(step: str) -> list[Cells]:
    """Parts of a step on GPUs, by arithmetic."""
    from bench import roofline

    return roofline.table(json.loads(roofline.RESULTS.read_text()), step)


_TABLES = (readme, steps, gpu, augment, rand_augment, info_nce, cond_norm, conv3x3, loader, images, probes)
_TABLES += (codecs, methods, online)
TABLES = {f.__name__: f for f in _TABLES}
TABLES |= {f"roofline_{step}": partial(roofline, step) for step in ("navigator", "pretrain")}


def markdown(table: list[Cells]) -> str:
    lines = [table[0], ("---",) * len(table[0]), *table[1:]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines).replace("|  |", "| |").replace("|  |", "| |")


def updated(text: str) -> str:
    """A page with its tables as the results are now."""
    pattern = r"(<!-- speed: (\w+) -->\n).*?(<!-- end -->)"
    return re.sub(pattern, lambda m: m[1] + markdown(TABLES[m[2]]()) + "\n" + m[3], text, flags=re.DOTALL)


def main() -> None:
    """Write them."""
    from bench.view import plots

    for page in PAGES:
        page.write_text(updated(page.read_text()))
    picture = plots.bars(plots.groups(rows_of("navigator")), "navigator, step, cpu")
    (ROOT / "docs" / "navigator_speed.png").write_bytes(picture)


if __name__ == "__main__":
    main()
