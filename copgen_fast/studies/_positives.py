"""Studies that compare ways of making positives at equal distance, E||dz||."""

from __future__ import annotations

from collections.abc import Sequence

from copgen_fast.studies import Arm, Settings, Study

MOVING = ("gaussian", "untrained-navigator", "navigator", "steering")
COLUMNS = ("knn_top1", "displacement_norm", "pairs_agreement_top1", "mi_lower_bound")
SEVERAL: Settings = {"pairs.positives_per_anchor": "3", "pairs.count": "2048", "pretrain.batch": "64"}
"""Three positives an anchor, on digits: four images of each of 2,048 anchors are as many images, in as many steps, as
two of each of 4,096."""


def study(
    preset: str,
    title: str,
    distances: Sequence[float],
    augmentations: Sequence[str],
    settings: Settings,
    columns: tuple[str, ...] = COLUMNS,
) -> Study:
    """Every way at every distance, with each policy of pretraining, compared with identity under the same policy."""
    return Study(
        preset=preset,
        arms=arms(distances, augmentations),
        settings={"probe.evals": ("linear", "knn", "pairs"), "evals.options.pairs.count": "2000", **settings},
        # Identity without T_x, where two views of a pair don't differ at all; else with the first policy.
        baseline=f"identity T_x={'none' if 'none' in augmentations else augmentations[0]}",
        within=("pretrain.augmentation",),
        columns=columns,
        title=f"Ways of making positives at equal distance, {title}",
    )


def arms(distances: Sequence[float], augmentations: Sequence[str]) -> tuple[Arm, ...]:
    """For each policy of pretraining: identity, and every way at every distance, `navigator d=1.4 T_x=none`.

    Policies share the navigators.
    """
    found = []
    for augmentation in augmentations:
        pretrain = {"pretrain.augmentation": augmentation}
        found.append(Arm(f"identity T_x={augmentation}", {"pairs.positives": "identity", **pretrain}))
        found += [
            Arm(f"{way} d={distance:g} T_x={augmentation}", {**moved(way, distance), **pretrain})
            for distance in distances
            for way in MOVING
        ]
    return tuple(found)


def moved(way: str, distance: float) -> Settings:
    """Settings of positives made one way, with all displacements scaled so that their mean length is the distance.

    The navigator is trained within the ball of that radius (Eq. 5).
    """
    at = f"{distance:g}"
    ball = {"navigator.delta": at, "navigator.project": "True"} if way == "navigator" else {}
    return {"pairs.positives": way, f"positive.options.{way}.distance": at, **ball}
