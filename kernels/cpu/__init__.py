"""The native CPU path: C++ kernels that are built at first use."""


def available() -> bool:
    return False


def reason() -> str:
    return "the native CPU kernels are not built"
