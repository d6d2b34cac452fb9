"""The steering demonstration as a widget, for JupyterLab and voila."""

from pathlib import Path
from typing import Any

import anywidget
import traitlets

from corec import CorecError
from corec.params import Params
from corec.steering.session import Session

FILES = Path(__file__).parent


class Steering(anywidget.AnyWidget):
    """Steer the list of one user at a time.

    The lists are drawn in the browser (``widget.js``). It sends messages ``{number, kind, user, request}``, where `kind` is
    ``open`` or ``answer``, and gets the result of the method of :class:`corec.steering.session.Session` of that name.

    Parameters
    ----------
    settings
        Parameters of a run whose stage 04 has finished.
    most
        Largest number of users.
    """

    _esm = FILES / "widget.js"
    _css = FILES / "widget.css"
    about = traitlets.Unicode().tag(sync=True)
    users: traitlets.List[Any] = traitlets.List().tag(sync=True)

    def __init__(self, settings: Params, most: int = 200) -> None:
        self.session = Session(settings, most)
        super().__init__(about=self.session.about(), users=self.session.users())
        self.on_msg(self.reply)

    def reply(self, widget: Any, message: dict[str, Any], buffers: Any) -> None:
        """Answer one message of the browser.

        Raises
        ------
        CorecError
            If the message names a user who is not in the list, or is not of this form.
        """
        try:
            place, kind, values = int(message["user"]), message["kind"], [int(value) for value in message["request"]]
        except (KeyError, TypeError, ValueError):
            raise CorecError(f"The message {message!r} is not of the form number, kind, user, request.") from None
        if place not in self.session.places or kind not in ("open", "answer"):
            raise CorecError(f"The message {message!r} names no user or kind of this demonstration.")
        result = self.session.open(place) if kind == "open" else self.session.answer(place, values)
        self.send({"number": message["number"], "result": result})
