"""gunicorn entry point: `gunicorn _wsgi:app`."""

from backend.logs import set_up_logging
from backend.settings import Settings
from backend.web.app import create_app
from model import GroundingDINO

settings = Settings()
set_up_logging(settings)
GroundingDINO(settings=settings).prepare()
app = create_app(GroundingDINO, settings)
