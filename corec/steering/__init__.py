"""Steering demonstration: one user's list under requests that are chosen by hand, live or in a static page."""

from corec.steering.page import collect, html, requests_of
from corec.steering.session import Session
from corec.steering.widget import Steering

__all__ = ["Session", "Steering", "collect", "html", "requests_of"]
