"""For schemathesis (SCHEMATHESIS_HOOKS): what our own formats are, so that good requests bring real images."""

import base64

import schemathesis
from factories import image_bytes
from hypothesis import strategies as st

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
IMAGES = st.integers(0, 9).map(lambda seed: image_bytes(seed, (12, 9), format=FORMATS[seed % len(FORMATS)]))

schemathesis.openapi.format("base64-image", IMAGES.map(lambda data: base64.b64encode(data).decode()))
schemathesis.openapi.format("image-file", IMAGES)
for name in FORMATS:
    schemathesis.openapi.media_type(f"image/{name.lower()}", IMAGES)
schemathesis.openapi.media_type("application/octet-stream", IMAGES)
