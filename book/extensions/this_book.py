"""Two small things that this book asks of Sphinx, and that no setting gives."""

from sphinx.application import Sphinx
from sphinx.config import Config


def fill_in_address(app: Sphinx, config: Config) -> None:
    """Let pages write ``{{ repository }}``: the address stands in `_config.yml` alone."""
    config.myst_substitutions["repository"] = config.html_theme_options["repository_url"]


def drop_thebe(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Live cells from another host are not used, but their script is added to every page."""
    kept = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in str(script).lower()
        and "thebe" not in getattr(script, "attributes", {}).get("body", "").lower()
    ]
    context["script_files"] = kept


def setup(app: Sphinx) -> dict[str, bool]:
    """Register both hooks."""
    app.connect("config-inited", fill_in_address)
    app.connect("html-page-context", drop_thebe, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
