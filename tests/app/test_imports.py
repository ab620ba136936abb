from __future__ import annotations

import subprocess
import sys


def test_the_gateway_never_loads_torch() -> None:
    program = "import sys, app.main; print(sorted({'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
