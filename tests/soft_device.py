"""What our tests mend of softcuda, the CUDA device made of CPU memory, where they run on it."""

import importlib


def mend():
    """Launches from C++ reach what operations of the CPU's allocated, such as the outputs of convolutions.

    The machine bounds a launch's pointers by its own allocator's blocks, and takes others for no memory at all. Here
    they reach to the end of their mapping: launches from Python, which are handed tensors, are bounded exactly.
    """
    launches = importlib.import_module("softcuda.launches")
    run = launches._run
    if not hasattr(run, "mended"):

        def mended(device, *arguments):
            return run(_Device(device), *arguments)

        mended.mended = run
        launches._run = mended


class _Device:
    def __init__(self, device):
        self.device = device

    def softcuda_extent(self, address):
        return self.device.softcuda_extent(address) or _to_the_end_of_its_mapping(address)


def _to_the_end_of_its_mapping(address):
    if address < 2**32:  # a number: eight bytes may be either
        return 0
    with open("/proc/self/maps") as maps:
        for line in maps:
            start, _, end = line.partition(" ")[0].partition("-")
            if int(start, 16) <= address < int(end, 16):
                return int(end, 16) - address
    return 0
