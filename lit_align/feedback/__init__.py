"""Where preferences and better answers come from, when nobody has written them."""

from lit_align.feedback.sampled import BestOfN, BestWorstPairs

__all__ = ["BestOfN", "BestWorstPairs"]
