"""Philox4x32 in Python's own integers and the answers that its authors publish: what all random words are held to."""

# Random123's known-answer vectors (kat_vectors): rounds, (counter, key), words.
PI = ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0))
ONES = ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2)
ZEROS = ((0,) * 4, (0,) * 2)
KNOWN = [
    (7, ZEROS, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (7, ONES, (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662)),
    (7, PI, (0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A)),
    (10, ZEROS, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (10, ONES, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (10, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


def philox(counter, key, rounds=7):
    """Four words, written from Salmon et al. 2011, section 3.3 and table 2."""
    counter, key = list(counter), list(key)
    for _ in range(rounds):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return tuple(counter)


def words(seed, start, count):
    """Of the memory positions from ``start`` on: word i % 4 at counter i // 4, as a signed number."""
    found = []
    for i in range(start, start + count):
        c, key = i // 4, seed % 2**64
        word = philox((c % 2**32, c // 2**32, 0, 0), (key % 2**32, key // 2**32))[i % 4]
        found.append(word - 2**32 if word >= 2**31 else word)
    return found
