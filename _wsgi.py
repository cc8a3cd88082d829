"""gunicorn's door: `gunicorn _wsgi:app`."""

import logging

from backend.api import create_app
from backend.settings import Settings
from model import GroundingDINO

settings = Settings.from_env()
logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
app = create_app(GroundingDINO, settings)
