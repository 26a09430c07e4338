"""Deep-learning stock-selection factors as native Qlib parts."""

import os

__version__ = "0.1.0"

# Threads of OpenMP spin while they wait for each other, by default. Networks this small
# wait at thousands of points a second, and beside another program on the same cores two
# spinning threads take many times as long as one (docs/operating.md). Read when
# the library is loaded, so it must be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def _check_neighbour() -> None:
    """Say so if a folder of the user's hides the installed `data_handlers`."""
    from importlib.util import find_spec
    from pathlib import Path

    found = find_spec("data_handlers")
    places = list(found.submodule_search_locations or ()) if found else []
    if found and not any((Path(p) / "families.py").is_file() for p in places):
        raise ImportError(
            f"`data_handlers` is {places[0] if places else found.origin}, which hides "
            "the package of that name that comes with qlib_ext; rename it, or run from "
            "another folder."
        )


_check_neighbour()
