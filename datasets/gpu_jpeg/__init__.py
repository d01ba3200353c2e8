"""Decoding patches on the GPU: JPEGs are stacked, nvJPEG makes planes of them, a kernel makes RGB of those."""
