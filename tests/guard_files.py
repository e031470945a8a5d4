"""Files of guards that are damaged in every way, for the readers in Python and in C."""

from __future__ import annotations

import json
import math
import zlib

import safetensors.torch

DAMAGES = (
    "truncated", "empty", "text", "trailing", "foreign", "newer", "rate", "rate in hex", "no rate",
    "another rate", "no head", "more told", "no checksum", "flipped bit", "missing", "more", "width",
    "dtype", "nan", "order", "counts", "samples", "many samples", "classes", "threshold", "spread",
)  # fmt: skip


def damaged(content: bytes, how: str) -> bytes:
    """The content of a guard's file, damaged; the checksum fits again where it is not the point."""
    tensors = safetensors.torch.load(content)
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    told = header["__metadata__"]
    match how:
        case "truncated":
            return content[:-10]
        case "empty":
            return b""
        case "text":
            return b"a guard, honestly"
        case "trailing":
            return content + b"junk"
        case "flipped bit":
            return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]
        case "foreign":
            told["format"] = "pt"
        case "newer":
            told["version"] = "99"
        case "rate":
            told["false_positive_rate"] = "1.5"
        case "rate in hex":
            told["false_positive_rate"] = "0x1p-5"
        case "another rate":
            told["false_positive_rate"] = "0.3"
        case "no rate":
            del told["false_positive_rate"]
        case "no head":
            del told["head"]
        case "more told":
            told["more"] = "of it"
        case "missing":
            del tensors["basis"]
        case "more":
            tensors["more"] = tensors["threshold"].clone()
        case "width":
            tensors["direction"] = tensors["direction"][:, :-1].contiguous()
        case "dtype":
            tensors["mean"] = tensors["mean"].double()
        case "nan":
            tensors["mean"][0, 0] = math.nan
        case "order":
            tensors["knots"] = tensors["knots"].flip(0).contiguous()
        case "counts":
            tensors["exceeding"] = tensors["exceeding"].flip(0).contiguous()
        case "samples":
            tensors["samples"] += 1
        case "many samples":
            tensors["samples"].fill_(2**63 - 1)
        case "classes":
            tensors["class_counts"][0] -= 1
        case "threshold":
            tensors["threshold"] += 1e9
        case "spread":
            tensors["inverse_spread"][3] = 0
    saved = safetensors.torch.save(tensors)
    data = saved[8 + int.from_bytes(saved[:8], "little") :]
    told["crc32"] = str(zlib.crc32(data))
    if how == "no checksum":
        del told["crc32"]
    return safetensors.torch.save(tensors, metadata=told)
