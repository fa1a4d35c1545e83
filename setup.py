"""Build metadata, read from settings.ini (nbdev's own setup.py breaks on new setuptools)."""

import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
names = ("score", "notebook", "validate", "backend", "dev")
extras = {name: shlex.split(settings[f"{name}_requirements"]) for name in names}
extras["all"] = sorted({*extras["score"], *extras["notebook"], *extras["validate"]})
extras["dev"] += [*extras["all"], *extras["backend"]]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=settings["keywords"],
    packages=find_packages(include=["refimg", "refimg.*"]),
    include_package_data=True,
    package_data={"refimg": ["py.typed", "adapters/*.toml",
                             "sandbox/weights/*", "sandbox/weights/*/*"]},
    python_requires=f">={settings['min_python']},<{settings['max_python']}",
    install_requires=shlex.split(settings["requirements"]),
    extras_require=extras,
    entry_points={"console_scripts": shlex.split(settings["console_scripts"])},
    classifiers=["Programming Language :: Python :: 3", "Framework :: Jupyter"],
    zip_safe=False,
)
