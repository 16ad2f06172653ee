import os

# Before torch is imported. Its client of a store that is gone prints 25 C++ frames above the line that says so; what is
# an error to torch is still printed.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
