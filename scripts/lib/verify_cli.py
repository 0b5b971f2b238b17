"""scripts/verify: is this machine's own picture the right one, and how fast is it made?

Checks every file's hash, then makes five pictures by stock diffusers and by this engine, in each
precision and each way, and compares them; looks at them with the safety checker where that is
installed; and times the engine as it serves. All of it goes into one file of JSON, which is written
anew after each row. Ends with 1 where anything is worse than it must be.

Without MODEL it is DMD2_MODEL, or sdxl-4step, or where that is not installed the bundled demo.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> None:
    """Verify, print a line for each row, and end with 1 where one failed."""
    options = parse_arguments(arguments)
    from environment import has_gpu, why_without_cuda

    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if has_gpu() and (why := why_without_cuda(sys.executable)):
        sys.exit(why)
    from default_model import choose_model
    from verify_report import Report
    from verify_rows import verify_model

    from dmd2.errors import DMD2Error
    from dmd2.settings import Settings

    model = choose_model(options.model, os.environ)
    report = Report(options.report, model)
    try:
        settings = Settings.from_environment({**os.environ, "DMD2_MODEL": model})
        verify_model(settings, report, options.precisions)
    except DMD2Error as error:
        report.add({"row": "model", "passed": False, "error": str(error)})
    print(f"the report is in {options.report}")
    if failed := report.failed:
        sys.exit(f"not as it must be: {', '.join(failed)}")


def parse_arguments(arguments: list[str] | None) -> Any:
    """The flags."""
    parser = argparse.ArgumentParser(
        prog="scripts/verify",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("model", nargs="?", metavar="MODEL", help="a manifest entry or a model folder")
    add("--report", type=Path, default=Path("verify.json"), metavar="FILE", help="verify.json")
    add(
        "--precisions",
        nargs="+",
        choices=("float32", "float16", "bfloat16"),
        help="on a GPU all, on a CPU float32, which is what the others are compared with",
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
