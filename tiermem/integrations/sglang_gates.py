"""How many tokens SGLang may count on at once: what fits on the GPU, not what has an address.

SGLang counts with the pages of its pool: free ones and those that its tree could give up. Ours are
virtual, several times what the GPU holds. So its own gates decide about addresses, and these about
memory: a page that a request uses takes a frame, one that only the tree knows does not.
"""

from __future__ import annotations

from collections.abc import Callable

RESERVED = 1
"""Page 0 is always resident."""


class Gates:
    """Token counts for one pool of `pages` virtual pages."""

    def __init__(self, pages: int, page_size: int, budget: Callable[[], int]) -> None:
        """budget: pages that may be on the GPU at once, the same answer on all ranks."""
        self.pages = pages
        self.page_size = page_size
        self._budget = budget

    def resident_tokens(self) -> int:
        """Tokens that all running requests may have together."""
        return max(0, min(self._budget() - RESERVED, self.pages)) * self.page_size

    def withheld_tokens(self) -> int:
        """By how much SGLang's own count, free plus evictable, is above what requests may take.

        Free + evictable + in use is always the whole pool, so this does not depend on them.
        """
        return self.pages * self.page_size - self.resident_tokens()

    def spare_tokens(self, free: int, evictable: int) -> int:
        """Tokens that requests may still take, below 0 while they have more than they may."""
        return free + evictable - self.withheld_tokens()

    def longest_request(self) -> int:
        """Tokens of the longest request that could ever run, prompt and answer together.

        One page is what SGLang's own admission sets aside for the last page of a request.
        """
        return max(0, self.resident_tokens() - self.page_size)
