"""The exceptions of the store.

PrunefrontError
└── StoreError (RuntimeError)     anything the database could not do; the text says what to do next
    ├── StoreUnavailableError     no database answers at the address
    ├── StoreLockedError          another process holds the database for too long
    ├── StoreSchemaError          tables of a newer (or no) prunefront
    ├── LeaseLostError            the writer was superseded and must stop working on the job
    ├── NotFoundError             no such job, candidate, table, device
    ├── ConflictError             the request contradicts what is stored
    ├── DocumentError (ValueError)        a value no database could store as it is (NaN, NUL, lone surrogate)
    └── InvalidCursorError (ValueError)   a page cursor that this store did not hand out
"""

from __future__ import annotations

from prunefront.errors import PrunefrontError


class StoreError(PrunefrontError, RuntimeError):
    """Something the database could not do; whatever was committed before is intact."""


class StoreUnavailableError(StoreError):
    """No database answers at the address, or it refused the connection."""


class StoreLockedError(StoreError):
    """Another process held the database longer than the store is willing to wait."""


class StoreSchemaError(StoreError):
    """The tables belong to another version of prunefront."""


class LeaseLostError(StoreError):
    """The caller's lease was superseded: stop working on the job, somebody else owns it."""


class NotFoundError(StoreError):
    """The store holds nothing under that name."""


class ConflictError(StoreError):
    """The request contradicts the state or the content of what is stored."""


class DocumentError(StoreError, ValueError):
    """A value that no database could hand back as it was given."""


class InvalidCursorError(StoreError, ValueError):
    """A page cursor that this store did not hand out."""
