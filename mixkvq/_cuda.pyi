"""Types of the CUDA extension, absent where nvcc was not found; `csrc/cuda/mixkvq_cuda.h` is the manual."""

__version__: str
built: str
_C_API: object

def versions() -> tuple[int, int]: ...
def devices() -> list[tuple[str, int, int, int]]: ...
