"""Pictures over HTTP: at once, with previews, and four that are fetched later.

pip install ./clients/python && python docs/examples/http_client.py http://127.0.0.1:8000
"""

from __future__ import annotations

import sys
from pathlib import Path

from fewstep_client import Client, FewstepError, Preview


def main(url: str) -> None:
    with Client(url) as client:
        picture = client.generate("a red apple on a blue background", seed=7)
        Path(f"apple.{picture.format}").write_bytes(picture.data)
        print(f"seed {picture.seed}, drawn in {picture.timings.total_ms:.0f} ms")

        for item in client.stream("a fox on a green background", output_format="png"):
            if isinstance(item, Preview):
                print(f"preview after step {item.step} of {item.num_inference_steps}")
            else:
                Path("fox.png").write_bytes(item.data)

        generation_id = client.submit("a panda on a yellow background", num_images=4)
        for panda in client.wait(generation_id):
            Path(f"panda-{panda.index}.{panda.format}").write_bytes(panda.data)


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except FewstepError as error:
        sys.exit(f"{type(error).__name__}: {error}")
