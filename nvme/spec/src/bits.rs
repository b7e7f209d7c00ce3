//! The macro that declares a register or dword made of bit fields.

/// Declares a newtype over an unsigned integer with a getter and a `with_` setter per field.
/// A setter keeps only the bits that fit the field.
macro_rules! bitfields {
    (
        $(#[$meta:meta])*
        $vis:vis struct $name:ident($raw:ty) {
            $( $(#[$fmeta:meta])* $get:ident / $with:ident : $lo:literal, $width:literal; )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
        $vis struct $name(pub $raw);

        impl $name {
            $(
                $(#[$fmeta])*
                #[inline]
                pub const fn $get(self) -> $raw {
                    (self.0 >> $lo) & (<$raw>::MAX >> (<$raw>::BITS - $width))
                }

                #[doc = concat!("This value with the field `", stringify!($get), "` replaced.")]
                #[inline]
                #[must_use]
                pub const fn $with(self, value: $raw) -> Self {
                    let mask = <$raw>::MAX >> (<$raw>::BITS - $width);
                    Self((self.0 & !(mask << $lo)) | ((value & mask) << $lo))
                }
            )*
        }
    };
}

/// Declares a fieldless enum over an integer code with a checked conversion from it.
macro_rules! codes {
    (
        $(#[$meta:meta])*
        $vis:vis enum $name:ident($raw:ty) {
            $( $(#[$vmeta:meta])* $variant:ident = $code:literal, )*
        }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr($raw)]
        $vis enum $name {
            $( $(#[$vmeta])* $variant = $code, )*
        }

        impl $name {
            /// The variant of this code, or `None` for a code not listed here.
            #[inline]
            pub const fn from_code(code: $raw) -> Option<Self> {
                match code {
                    $( $code => Some(Self::$variant), )*
                    _ => None,
                }
            }

            /// The code as it stands on the wire.
            #[inline]
            pub const fn code(self) -> $raw {
                self as $raw
            }
        }
    };
}

pub(crate) use bitfields;
pub(crate) use codes;
