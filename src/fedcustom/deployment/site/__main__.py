"""Entry point of a site's resident process: ``python -m fedcustom.deployment.site KIT SITE_TOML``, and
``--data-changed=accept`` where runs go on with other rows.
"""

import sys
from pathlib import Path

from ..nvflare.kits import site_name
from .resident import serve
from .rows import ACCEPT
from .settings import load_site

kit, settings_file = Path(sys.argv[1]), Path(sys.argv[2])
serve(
    site_name(kit),
    load_site(settings_file),
    settings_file.parent,
    kit / "fedcustom",
    "accept" if sys.argv[3:] == [ACCEPT] else "refuse",
)
