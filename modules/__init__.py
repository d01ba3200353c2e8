"""Encoders and MIL heads."""
