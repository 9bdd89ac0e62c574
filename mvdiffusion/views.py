"""Names of views and of backgrounds: what settings may say of the data, without NumPy or PyTorch."""

from collections.abc import Sequence

POSES = ("tilted", "upright", "rendered")
AZIMUTHS_DEG = {
    "front": 0, "front_right": 45, "right": 90, "back_right": 135,
    "back": 180, "back_left": 225, "left": 270, "front_left": 315,
}  # fmt: skip
FIXED_VIEWS = (*AZIMUTHS_DEG, "top")
# What `num_views` alone stands for. 4, 5 and 6 are Wonder3D's; the original takes the first V of the six instead.
VIEW_LISTS = {
    1: ("front",),
    2: ("front", "back"),
    3: ("front", "right", "left"),
    4: ("front", "right", "back", "left"),
    5: ("front", "front_right", "right", "back", "left"),
    6: ("front", "front_right", "right", "back", "left", "front_left"),
    8: tuple(AZIMUTHS_DEG),
}
Colour = tuple[float, float, float]
BACKGROUNDS: dict[str, tuple[float, ...]] = {
    "white": (1.0,),
    "black": (0.0,),
    "gray": (0.5,),
    "three_choices": (1.0, 0.0, 0.5),
}


def choose_views(num_views: int, views: Sequence[str] | None = None, poses: str = "tilted") -> tuple[str, ...]:
    """The names of the views in the order of the rows: `views`, or what `VIEW_LISTS` has for `num_views`.

    Raises ValueError for an unknown kind of poses, a number without a list, or a list that has another length, repeats
    a view, or (unless poses are "rendered") names one that has no fixed pose.
    """
    if poses not in POSES:
        raise ValueError(f"poses is {poses!r}, but must be one of {', '.join(POSES)}")
    if views is None:
        if num_views not in VIEW_LISTS:
            known = ", ".join(map(str, VIEW_LISTS))
            raise ValueError(f"num_views is {num_views}, which has no list of its own (only {known} have): set views")
        return VIEW_LISTS[num_views]
    if len(views) != num_views:
        raise ValueError(f"views names {len(views)} views ({', '.join(views)}), but num_views is {num_views}")
    if len(set(views)) < len(views):
        raise ValueError(f"views names a view twice: {', '.join(views)}")
    unknown = [view for view in views if view not in FIXED_VIEWS]
    if unknown and poses != "rendered":
        raise ValueError(
            f"{', '.join(map(repr, unknown))} in views has no {poses} pose (there are {', '.join(FIXED_VIEWS)}); "
            "set poses to 'rendered' to read each object's own"
        )
    return tuple(views)


def require_condition_view(view: str, views: Sequence[str]) -> None:
    """Raises ValueError for a condition view that is none of the views."""
    if view not in views:
        raise ValueError(f"the condition view {view!r} is not among the views {', '.join(views)}")


def colours_of(background: str | float) -> list[Colour] | None:
    """The background colours to draw from; None for "random", all there are. Raises ValueError for no background."""
    if background == "random":
        return None
    if isinstance(background, str):
        levels = BACKGROUNDS.get(background)
    else:
        levels = (float(background),) if isinstance(background, int | float) and 0 <= background <= 1 else None
    if levels is None:
        names = ", ".join(map(repr, [*BACKGROUNDS, "random"]))
        raise ValueError(f"the background is {background!r}, but must be one of {names} or a grey level in [0, 1]")
    return [(level, level, level) for level in levels]


def require_countable(backgrounds: list[Colour] | None) -> None:
    """Raises ValueError for `colours_of` "random"."""
    if backgrounds is None:
        raise ValueError(
            "the background is 'random', a continuum of colours, so its variants cannot be listed; "
            "choose 'three_choices' or one colour"
        )
