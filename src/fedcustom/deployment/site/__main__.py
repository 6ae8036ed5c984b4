"""Entry point of a site's resident process: ``python -m fedcustom.deployment.site KIT SITE_TOML``."""

import sys
from pathlib import Path

from ..nvflare.kits import site_name
from .resident import serve
from .settings import load_site

kit, settings_file = Path(sys.argv[1]), Path(sys.argv[2])
serve(site_name(kit), load_site(settings_file), settings_file.parent, kit / "fedcustom")
