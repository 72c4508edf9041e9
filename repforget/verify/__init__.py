"""The prosecutor and the judge: attacks on a saved edit, evidence with its controls, and a verdict.

``repforget.verify(model, edit, knowledge, twins=...)`` runs :func:`repforget.verify._verify.verify`.
"""

from __future__ import annotations

from repforget._callable import make_callable

make_callable(__name__, "repforget.verify._verify:verify")
