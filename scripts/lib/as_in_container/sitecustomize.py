"""What a checkout has and the container has not is hidden from Cog's server.

diffusers imports these where it finds them, which is not what the container does, and takes more
than a second. Python runs this file at its start where its folder is on PYTHONPATH.
"""

import sys

for name in ("matplotlib", "peft", "scipy"):
    sys.modules[name] = None  # type: ignore[assignment]  # as if it were not installed
