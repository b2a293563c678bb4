"""What all tests share: this folder's models, and one set of threads."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # `import models` from any folder
