"""Where a map can be folded: found by running a block once, and verified by its unchanged output."""

from fewbit.seams.diagonal import Seam, find_seams, fold, fold_checked

__all__ = ["Seam", "find_seams", "fold", "fold_checked"]
