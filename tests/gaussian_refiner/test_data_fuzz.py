"""Any json as a list of pairs ends in one sentence of ours."""

import json
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gaussian_refiner.data import read_pairs

PATHS = st.text(max_size=8) | st.sampled_from(["/etc", "..", "a\0b", "x" * 300]) | st.none() | st.integers()
LISTS = st.lists(PATHS, max_size=3) | PATHS
PARALLEL = st.fixed_dictionaries({"render": LISTS, "gt": LISTS, "cond": LISTS})
ITEM = st.dictionaries(st.sampled_from(["image", "target_image", "ref_image", "prompt"]), PATHS, max_size=4) | PATHS
SPLIT = st.dictionaries(st.text(max_size=3), ITEM, max_size=3) | PATHS
DIFIX = st.fixed_dictionaries({"train": SPLIT, "test": SPLIT})
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=PARALLEL | DIFIX | ANYTHING, holdout=st.integers(0, 3), with_root=st.booleans())
def test_any_list(tmp_path: Path, content: object, holdout: int, with_root: bool) -> None:
    path = tmp_path / "list.json"
    path.write_text(json.dumps(content))
    try:
        read_pairs(path, tmp_path if with_root else None, holdout)
    except ValueError as error:
        assert str(path) in str(error)
    else:
        raise AssertionError(f"{content!r} lists no file that exists")
