"""What the command line leaves out to start sooner and to need less memory."""

from __future__ import annotations

import sys


def without_blas() -> None:
    """Import numba without scipy's linear algebra, which it binds to its own matrix products if it is there.

    regraft's compiled loops have none. A second BLAS library costs a third of a second and, where private memory is
    limited, more than is there: it maps buffers for every core, and waits for ever if it gets none.
    """
    if "numba" in sys.modules or "scipy.linalg" in sys.modules:
        return
    sys.modules["scipy.linalg"] = None  # type: ignore[assignment] # the import system's word for "not there"
    try:
        import numba.np.arraymath  # noqa: F401
    finally:
        del sys.modules["scipy.linalg"]
