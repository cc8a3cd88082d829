"""gunicorn's door: `gunicorn _wsgi:app`."""

from backend.api import create_app
from backend.logs import set_up_logging
from backend.settings import Settings
from model import GroundingDINO

settings = Settings.from_env()
set_up_logging(settings)
GroundingDINO(settings=settings).prepare()
app = create_app(GroundingDINO, settings)
