"""Every definition of paper §4.3 in plain loops over NumPy float64 arrays, one token at a time."""

import numpy as np


def naive_top(values, k=5):
    """Indices of the k largest, the largest first, ties to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:k]


def naive_control(image, label, classes):
    """MurmurHash3's finaliser in NumPy's unsigned arithmetic; a class other than the label."""
    h = np.array([image], np.uint32) + np.uint32(0x9E3779B9)
    h ^= h >> np.uint32(16)
    h *= np.uint32(0x85EBCA6B)
    h ^= h >> np.uint32(13)
    h *= np.uint32(0xC2B2AE35)
    h ^= h >> np.uint32(16)
    others = [(label + 1 + step) % classes for step in range(classes - 1)]
    return others[int(h[0]) % (classes - 1)]


def naive_flags(coefficients, embedding, values, top1, label, control):
    """Flags of one token.

    coefficients [F]; embedding [C, D]; values [D, F]; top1: class; label and control: classes.
    """
    products = embedding @ values
    top = naive_top(coefficients)
    top_classes = {j: naive_top(products[:, j]) for j in top}
    return {
        "agreement": bool(set(top) & set(naive_top(products[label]))),
        "agreement_control": bool(set(top) & set(naive_top(products[control]))),
        "agreement_text": any(label in top_classes[j] for j in top),
        "agreement_text_control": any(control in top_classes[j] for j in top),
        "composed": int(top1) in {top_classes[j][0] for j in top},
    }


def unpacked(flags):
    """The bits of stored flags by name."""
    names = (
        "agreement",
        "agreement_control",
        "agreement_text",
        "agreement_text_control",
        "composed",
    )
    return {name: (flags >> bit) & 1 == 1 for bit, name in enumerate(names)}
