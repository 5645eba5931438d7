"""Batch scoring of screenshots on Ray and TensorFlow."""

__version__ = "0.1.0"
