"""The client of mnemosyned, beyond the generated stubs of `mnemosynerpc`: so far, its version."""

__version__ = "0.1.0"
