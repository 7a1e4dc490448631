"""Make GGUF files with llama.cpp's own quantizer. usage: llama_cpp_quantize.py IN.gguf OUT.gguf FORMAT

FORMAT: F32, Q4_0, Q4_K_M, IQ4_NL, Q8_0 and all others that llama.cpp has a file type for. A quantized file is
dequantized to F32 first; the others are made from that.
"""

from __future__ import annotations

import sys

import llama_cpp


def main() -> None:
    source, target, name = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    kind = "ALL" if name == "F32" else "MOSTLY"
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}_{name}")
    parameters.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters):
        raise SystemExit(f"llama.cpp cannot quantize {source} to {name}")


if __name__ == "__main__":
    main()
