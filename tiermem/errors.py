"""Every error that tiermem raises on purpose. Each message carries numbers and the way out."""


class TierMemError(Exception):
    """Base of all errors below; catch it to catch everything tiermem raises on purpose."""


class ConfigError(TierMemError):
    """A configuration that cannot be meant or cannot hold; it names key, value and source."""


class TierFull(TierMemError):
    """A reserve that the tier's capacity cannot serve now; nothing was reserved."""


class TierFailed(TierMemError):
    """A tier that stopped working (I/O error, lost device); closed until it is reopened."""


class PageLost(TierMemError):
    """A page whose only copy could not be read back as it was written; compute it again."""


class PageInUse(TierMemError):
    """An operation on pages that somebody has pinned."""


class NotOurs(TierMemError):
    """Pages outside the region, or not allocated."""


class Closed(TierMemError):
    """Use of a space, region, tier or route after it was closed."""


class DriverError(TierMemError):
    """A driver or system call that failed; it names the call, the error and its cause."""


class BadPolicy(TierMemError):
    """A policy that could not be loaded, or whose answer broke the rules."""


class BadTrace(TierMemError):
    """A trace with lines that cannot be read; the message has the file, line number and reason."""
