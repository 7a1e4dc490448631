"""What files take compressed. FOLDER SHARE; prints JSON: bytes as they are, by zstd (level 19) and by gzip (level 6).

Of files larger than 64 MB only every SHARE-th piece of 4 MB is compressed, and the result multiplied: level 19 takes
minutes for a float32 model. Pieces are compressed on their own; a window of zstd's is 8 MB at this level, and weights
repeat nothing over such distances. Runs in an environment with zstandard.
"""

from __future__ import annotations

import json
import sys
import zlib
from pathlib import Path

import zstandard

PIECE, WHOLE = 4 << 20, 64 << 20


def sizes(path: Path, share: int) -> dict[str, float]:
    size = path.stat().st_size
    step = share if size > WHOLE else 1
    compressor = zstandard.ZstdCompressor(level=19)
    seen = zstd = gzip = 0
    with path.open("rb") as file:
        for start in range(0, size, PIECE * step):
            file.seek(start)
            piece = file.read(PIECE)
            seen += len(piece)
            zstd += len(compressor.compress(piece))
            gzip += len(zlib.compress(piece, 6))
    return {"bytes": size, "zstd": zstd * size / seen, "gzip": gzip * size / seen}


def main() -> None:
    files = [sizes(path, int(sys.argv[2])) for path in sorted(Path(sys.argv[1]).rglob("*")) if path.is_file()]
    print(json.dumps({key: round(sum(one[key] for one in files)) for key in files[0]}))


if __name__ == "__main__":
    main()
