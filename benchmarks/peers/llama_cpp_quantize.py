"""Make GGUF files with llama.cpp's own quantizer. usage: llama_cpp_quantize.py IN.gguf OUT.gguf FORMAT

FORMAT: F32, Q4_0, Q4_1, Q4_K_M, Q8_0. A quantized file is dequantized to F32 first; the others are made from that.
"""

from __future__ import annotations

import sys

import llama_cpp

FORMATS = {
    "F32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "Q4_1": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_1,
    "Q4_K_M": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
    "Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
}


def main() -> None:
    source, target, name = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = FORMATS[name]
    parameters.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters):
        raise SystemExit(f"llama.cpp cannot quantize {source} to {name}")


if __name__ == "__main__":
    main()
