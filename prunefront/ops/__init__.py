"""Tensor primitives shared by the methods. Pure functions; no module of timm in here."""
