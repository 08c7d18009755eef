"""`data:` URLs (RFC 2397): pictures inside of a request, as OpenAI's API takes them.

For: what can be told from the text in no time, and its bytes. Not for: what the bytes are; the declared type is not
believed, `data/images.py` looks.

Only base64 in the standard alphabet (RFC 4648, section 4) with its padding and nothing else: neither line breaks, nor
the URL-safe alphabet, nor percent-encoding, nor bare base64 without `data:`, as llama.cpp takes it. Lenient decoders
skip what they do not know, and then two programs see two pictures.
"""

from __future__ import annotations

import binascii
from dataclasses import dataclass

from minigpt4_jax.serving.errors import invalid

MAX_HEAD = 256
"""Characters from `data:` to the comma, with parameters. They say nothing about a picture and are not read."""

_EXPECTED = "Expected data:image/png;base64, and then the file in base64"


@dataclass(frozen=True)
class DataUrl:
    """A `data:` URL whose form and length were checked; its content was not looked at."""

    url: str
    start: int
    """Where the base64 begins."""
    param: str
    """What an error calls it."""

    def decode(self) -> bytes:
        """The bytes; slow for a long one. Raises `ApiError` 400 unless all of it is base64."""
        try:
            return binascii.a2b_base64(self.url[self.start :], strict_mode=True)
        except ValueError:  # binascii.Error too
            pass
        raise invalid(
            "The picture is not in base64: expected A-Z, a-z, 0-9, + and / with = at the end to a multiple of 4, "
            "without line breaks, blanks or percent signs (`base64 -w0 FILE`).",
            param=self.param,
            code="invalid_base64_image",
        )


def parse_data_url(url: str, *, param: str, max_bytes: int) -> DataUrl:
    """Looks at the head and the length of a URL that begins with `data:` in any case.

    Raises:
        ApiError: 400 for another encoding than base64, another type than a picture, nothing in it, or more bytes than
            `max_bytes`, which the length tells before anything is decoded.
    """
    head, comma, _ = url[:MAX_HEAD].partition(",")
    media_type, *parameters = head[len("data:") :].lower().split(";")
    if not comma or not parameters or parameters[-1] != "base64":
        raise invalid(
            f"The picture's data: URL is not in base64, or its head is longer than {MAX_HEAD} characters. {_EXPECTED}.",
            param=param,
            code="invalid_image_url",
        )
    if not media_type.startswith("image/") and media_type != "application/octet-stream":
        raise invalid(
            f"The picture's data: URL does not declare a picture. {_EXPECTED}.",
            param=param,
            code="unsupported_image_media_type",
        )
    start = len(head) + 1
    padding = 2 if url.endswith("==") else url.endswith("=")
    num_bytes = (len(url) - start) // 4 * 3 - padding
    if num_bytes <= 0:
        raise invalid(
            f"The picture's data: URL has no picture in it. {_EXPECTED}.",
            param=param,
            code="empty_image_file",
        )
    if num_bytes > max_bytes:
        raise invalid(
            f"The picture has {num_bytes} bytes; expected at most {max_bytes}. Send a smaller copy.",
            param=param,
            code="image_file_too_large",
        )
    return DataUrl(url, start, param)
