#!/bin/bash
# Builds the three guest images out of systems that debootstrap installs, in the folder $1.
#
# Needs root, loop mounts and a Debian mirror; takes some minutes and about 20 GB. The images are those that
# the figures of docs/BENCHMARKS.md were made with: vm1 on day 0 (a Debian with compilers, a database server
# and 600 MB of database files), vm1 on day 1 (packages installed, 4000 pages of 8 KiB overwritten at random,
# a grown log), vm2 (another machine with much of the same software). Use: compare.py --images FOLDER
set -euo pipefail

folder=${1:?usage: debootstrap_images.sh FOLDER}
[ "$(id -u)" -eq 0 ] || { echo "debootstrap_images.sh: needs root; benchmarks/guests.py needs none" >&2; exit 1; }
mkdir -p "$folder/mnt"
cd "$folder"
trap 'mountpoint -q mnt && umount mnt; true' EXIT

apt-get update -q >/dev/null
apt-get install -y -q debootstrap >/dev/null
packages=python3,perl,gcc,git,vim-tiny,openssh-server,postgresql,nginx
[ -d guest ] || debootstrap --variant=minbase --include=$packages bookworm guest >debootstrap.log

make_disk() {
    truncate -s 8G "$1"
    mkfs.ext4 -q -F -d guest "$1"
    mount -o loop "$1" mnt
}

install_in_guest() {
    chroot mnt sh -c "apt-get install -y -q $*" >>install.log 2>&1 || echo "could not install $*" >&2
}

make_disk vm1-d0.raw
cp -a /usr/lib/x86_64-linux-gnu mnt/srv/
for folder_of_tools in /usr/lib/llvm-* "$HOME/.rustup"; do
    [ ! -d "$folder_of_tools" ] || cp -a "$folder_of_tools" mnt/srv/
done
mkdir -p mnt/var/lib/db
head -c 300M /dev/urandom >mnt/var/lib/db/t1.dat
python3 - <<'P'
import os, random
random.seed(1)
words = [b"alpha", b"beta", b"gamma", b"delta"]
with open("mnt/var/lib/db/t2.dat", "wb") as file:
    for _ in range(300):
        file.write(b"".join(
            b"%012d|%s|%s\n" % (random.getrandbits(36), random.choice(words) * 4, os.urandom(24).hex().encode())
            for _ in range(12000)))
P
sync
umount mnt

cp --sparse=always vm1-d0.raw vm1-d1.raw
mount -o loop vm1-d1.raw mnt
install_in_guest redis-server mariadb-server
python3 - <<'P'
import os, random
random.seed(2)
for name in ("t1.dat", "t2.dat"):
    with open(f"mnt/var/lib/db/{name}", "r+b") as file:
        pages = os.path.getsize(file.name) // 8192
        for _ in range(2000):
            file.seek(random.randrange(pages) * 8192)
            file.write(os.urandom(8192))
with open("mnt/var/log/app.log", "ab") as file:
    for i in range(400000):
        file.write(b"2026-11-22T03:%02d:%02d host app[%d]: request %d served in %d ms\n"
                   % (i // 60 % 60, i % 60, i % 977, i, random.randrange(900)))
P
sync
umount mnt

make_disk vm2-d0.raw
[ ! -d "$HOME/.rustup" ] || cp -a "$HOME/.rustup" mnt/home/
echo web2 >mnt/etc/hostname
install_in_guest nodejs
sync
umount mnt
du -sh ./*.raw
