"""Where is it kept? Locators rank the parts of a model by what they carry of a piece of knowledge.

``repforget.locate(model, knowledge, "attribution_patching")`` runs one by name; each file here is one method.
"""

from __future__ import annotations

from repforget._callable import make_callable

make_callable(__name__, "repforget.locate._dispatch:locate")
