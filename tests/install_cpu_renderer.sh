#!/usr/bin/env bash
# What `pip install -r requirements.txt` leaves to do:
# - Lets SAPIEN render without a GPU: installs Mesa's lavapipe (a Vulkan driver that runs on the CPU), 24.3 or newer.
#   For Debian 12 and 13 and Ubuntu 24.04; needs root or sudo. Changes nothing where SAPIEN can render already.
# - On Python 3.13 and newer, installs ManiSkill without mplib (see requirements.txt).
#   bash tests/install_cpu_renderer.sh [python]      python: the one that requirements.txt was installed for
set -euo pipefail
python=${1:-python}

render_a_frame() {
    "$python" - <<'PY' >/dev/null 2>&1
import os
import sapien
sapien.render.set_camera_shader_dir("trivial")  # the others take 10 s
device = sapien.Device("cuda" if os.path.exists("/dev/nvidiactl") else "cpu")
scene = sapien.Scene([sapien.physx.PhysxCpuSystem(), sapien.render.RenderSystem(device)])
camera = scene.add_camera("camera", 32, 32, 1.0, 0.01, 10)
scene.update_render()
camera.take_picture()
assert camera.get_picture("Color").shape[:2] == (32, 32)
PY
}

if ! "$python" -c "import mani_skill" 2>/dev/null && "$python" -c "import sys; sys.exit(sys.version_info < (3, 13))"; then
    "$python" -m pip install -q --no-deps "mani_skill>=3.0.1"
    "$python" -c 'from importlib.metadata import requires
print(*(need for need in requires("mani_skill") if not need.startswith("mplib") and "extra ==" not in need), sep="\n")' \
        | "$python" -m pip install -q -r /dev/stdin
fi
"$python" -c "import sapien" || { echo "install_cpu_renderer: $python has no sapien; run pip install -r requirements.txt first" >&2; exit 2; }
if render_a_frame; then
    echo "SAPIEN renders already; nothing to install."
    exit 0
fi

. /etc/os-release
sudo=$([ "$(id -u)" -eq 0 ] || echo sudo)
export DEBIAN_FRONTEND=noninteractive
suite=()
if [ "${ID}-${VERSION_ID:-}" = debian-12 ]; then
    # Debian 12's own Mesa is too old: take the backports suite of the mirror that this machine already uses.
    suite=(-t bookworm-backports)
    if ! grep -rqs bookworm-backports /etc/apt/sources.list /etc/apt/sources.list.d; then
        if [ -f /etc/apt/sources.list.d/debian.sources ]; then
            awk -v RS= '/bookworm-updates/ { sub(/Suites:[^\n]*/, "Suites: bookworm-backports"); print; exit }' \
                /etc/apt/sources.list.d/debian.sources | $sudo tee /etc/apt/sources.list.d/backports.sources >/dev/null
        else
            awk '$1 == "deb" && $3 == "bookworm" { $3 = "bookworm-backports"; print; exit }' \
                /etc/apt/sources.list | $sudo tee /etc/apt/sources.list.d/backports.list >/dev/null
        fi
    fi
fi
$sudo apt-get update -qq
$sudo apt-get install -y -qq ${suite[@]+"${suite[@]}"} mesa-vulkan-drivers >/dev/null

if render_a_frame; then
    echo "lavapipe is installed and SAPIEN renders."
else
    echo "install_cpu_renderer: SAPIEN still cannot render; it needs mesa-vulkan-drivers >= 24.3 (here: $(dpkg-query -W -f '${Version}' mesa-vulkan-drivers))" >&2
    exit 1
fi
